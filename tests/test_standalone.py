"""What can be copied: selfmis.py's upper part alone, and the three files without extras/."""

import ast
import json
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
from conftest import HERE

import selfmis

SOURCE = (HERE / "selfmis.py").read_text()
BANNER = "# Runs: what both scripts need"
UPPER, LOWER = SOURCE.split(BANNER)
LOWER = LOWER.partition("\n")[2]
SCRIPTS = ("selfmis.py", "train_pretrain.py", "train_probe.py")


def python(code, cwd, *arguments):
    """Python in a folder of its own, without this repository in its path."""
    command = [sys.executable, "-W", "error:::selfmis", "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150)


COPIED = """
import sys, random
for name in ("wfdb", "scipy", "matplotlib", "pandas"): sys.modules[name] = None
import numpy as np, torch
def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
before = states()
import selfmis
assert before == states()
assert not torch.cuda.is_initialized() and not hasattr(selfmis, "run_script")

x = np.random.default_rng(0).normal(size=(4, 12, 1000)).astype(np.float32)
pairs = selfmis.SelfCuttingDataset(x, leads=selfmis.LEADS, sample_rate_hz=100)
single, multi = (torch.stack(part) for part in zip(*pairs))
size = dict(stem=16, widths=(16, 32), depths=(1, 1))
teacher = selfmis.ResNet1D(12, **size).eval()
targets = selfmis.embed(teacher, multi, torch.device("cpu"))
assert targets.shape == (4, 32) and not targets.requires_grad
for loss in selfmis.LOSSES:
    model = selfmis.SelfMIS(selfmis.ResNet1D(1, **size), loss)
    model(single, targets).backward()
    assert all(p.grad is not None for p in model.parameters())
assert selfmis.siglip_loss(targets, targets) < selfmis.siglip_loss(targets, targets.flip(0))
assert selfmis.retrieval(targets, targets, (1, 2)) == {1: 100.0, 2: 100.0}
assert selfmis.roc_auc([0, 0, 1, 1], [.1, .4, .35, .8]) == .75
assert selfmis.macro_auc(np.eye(4), np.eye(4))[0] == 1
draws = selfmis.bootstrap_auc(np.eye(4)[:, :1], np.eye(4)[:, :1], draws=9)
assert selfmis.interval(draws[:, 0]) == (1, 1)

content = dict(encoder=teacher.state_dict(), architecture=teacher.architecture, lead="all")
content |= dict(sample_rate_hz=100, preprocessing={}, training_data=[])
torch.save(content, "12.pt")
assert selfmis.load_encoder("12.pt")(multi).equal(teacher(multi))

open("r.hea", "w").write("r 1 100 1000")
open("record_list.csv", "w").write("path,subject_id")
for package, attempt in (
    ("wfdb", lambda: selfmis.read_ecg("r")),
    ("scipy", lambda: selfmis.resample(x[0], 100, 500)),
    ("scipy", lambda: selfmis.preprocess(x[0], sample_rate_hz=100, filter="ecgfounder")),
    ("pandas", lambda: selfmis.find_records(".")),
):
    try:
        attempt()
        raise SystemExit(f"no error without {package}")
    except selfmis.UsageError as error:
        assert f"needs the package {package}: pip install {package}" in str(error)
        assert not isinstance(error, selfmis.RecordError)  # it would leave out every record
"""


def test_the_upper_part_works_alone_prints_nothing_and_draws_nothing(tmp_path):
    """With wfdb and what comes with it made unimportable."""
    (tmp_path / "selfmis.py").write_text(UPPER)
    done = python(COPIED, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def names_of(tree):
    """What a module defines at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_nothing_above_the_banner_uses_what_stands_below():
    names = names_of(ast.parse(LOWER))
    nodes = list(ast.walk(ast.parse(UPPER)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert {"Config", "RUN_FILES", "read_pairs", "environment"} <= names and len(names) > 30
    assert not names & used and not names & names_of(ast.parse(UPPER))


@pytest.mark.parametrize("source", [UPPER, LOWER])
def test_public_names_have_docstrings(source):
    bare = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not ast.get_docstring(node):
            bare.append(node.name)
    assert bare == []


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module


def test_imports_run_one_way():
    """extras and scripts -> selfmis; only selfmis' two doors name extras, and not at its top."""
    modules = {name: {module.split(".")[0] for module in imports(HERE / name)} for name in SCRIPTS}
    assert not modules["selfmis.py"] & {"extras", "train_pretrain", "train_probe"}
    assert not modules["train_pretrain.py"] & {"extras", "train_probe"}
    assert not modules["train_probe.py"] & {"extras", "train_pretrain"}


# Each command line in turn, as `python train_pretrain.py ...` would run it; the last one ends in
# os._exit, so that its exit code is the process's own.
WITHOUT_EXTRAS = """
import importlib.util, json, runpy, sys
assert importlib.util.find_spec("extras") is None
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory, ptbxl, mimic, tiny):
    """What three scripts in an empty folder did, and the folder."""
    folder = tmp_path_factory.mktemp("copied")
    for name in SCRIPTS:
        shutil.copy(HERE / name, folder)
    wfdb = folder / "somebody"
    shutil.copytree(mimic / "files", wfdb)
    shared = f"--single {tiny[1]} --multi {tiny[12]} --batch-size 8 --epochs 1 --workers 0"
    lines = [
        f"train_pretrain.py --data {ptbxl} {shared} --out ptbxl",
        f"train_pretrain.py --data {mimic} {shared} --out mimic",
        f"train_pretrain.py --data {wfdb} {shared} --out wfdb",
        f"train_probe.py --data {ptbxl} --encoder ptbxl/best.pt --epochs 1 --workers 0 --out p",
        f"train_probe.py --data {ptbxl} --encoder {tiny[12]} --lead all --finetune --epochs 1"
        " --batch-size 16 --workers 0 --out teacher",
        "train_pretrain.py --data synthetic:20 --multi random --size small --out synthetic",
    ]
    done = python(WITHOUT_EXTRAS, folder, json.dumps([line.split() for line in lines]))
    return done, folder


def test_without_extras_both_scripts_train_and_probe(without_extras):
    done, folder = without_extras
    assert "Traceback" not in done.stderr
    for name in ("ptbxl", "mimic", "wfdb"):
        assert len((folder / name / "log.jsonl").read_text().splitlines()) == 1
        assert (folder / name / "best.pt").is_file()
    for name in ("p", "teacher"):
        results = json.loads((folder / name / "results.json").read_text())
        assert 0 < results["diagnostic"]["mean"] < 1 and (folder / name / "probe.pt").is_file()
    assert done.stdout.count("next: python train_probe.py") == 3


def test_without_extras_synthetic_ecg_is_one_sentence(without_extras):
    done, folder = without_extras
    sentence = "error: synthetic ECG needs extras/synthetic.py, which is not here"
    assert done.returncode == 2 and done.stderr == f"{sentence}; give --data a folder\n"
    assert not (folder / "synthetic").exists()


def test_a_missing_part_of_extras_is_none_and_a_missing_package_an_error(monkeypatch):
    for missing in ("extras", "extras.baselines", "extras.baselines.networks"):
        error = ModuleNotFoundError(missing, name=missing)
        monkeypatch.setattr(selfmis.importlib, "import_module", Mock(side_effect=error))
        assert selfmis.import_extra("baselines.networks") is None
    for other in ("scipy", "extras.base", None):
        error = ModuleNotFoundError(other, name=other)
        monkeypatch.setattr(selfmis.importlib, "import_module", Mock(side_effect=error))
        with pytest.raises(ModuleNotFoundError):
            selfmis.import_extra("baselines.networks")
