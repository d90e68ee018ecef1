"""selfmis.py copied alone into an empty folder, without wfdb."""

import ast
import subprocess
import sys

from conftest import HERE

BANNER = "# Plumbing of the two scripts"


def python(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=100)


def test_import_prints_nothing_draws_nothing_and_the_core_works_without_wfdb(tmp_path):
    """The file up to the plumbing, with wfdb, scipy, matplotlib and pandas made unimportable."""
    source = (HERE / "selfmis.py").read_text()
    (tmp_path / "selfmis.py").write_text(source[: source.index(BANNER)])
    code = """
import sys, random
for name in ("wfdb", "scipy", "matplotlib", "pandas"): sys.modules[name] = None
import numpy as np, torch
before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
import selfmis
assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist() and before[2] == random.getstate()
assert not torch.cuda.is_initialized()
x, y = selfmis.synthesize(4, 0, sample_rate_hz=100)
pairs = selfmis.SelfCuttingDataset(x, leads=selfmis.LEADS, sample_rate_hz=100)
single, multi = (torch.stack(part) for part in zip(*pairs))
size = dict(stem=16, widths=(16, 32), depths=(1, 1))
model = selfmis.SelfMIS(selfmis.ResNet1D(1, **size), "learnable")
targets = selfmis.ResNet1D(12, **size)(multi).detach()
model(single, targets).backward()
assert all(p.grad is not None for p in model.parameters())
selfmis.retrieval(model.encoder(single).detach(), targets, (1, 2))
assert selfmis.roc_auc([0, 0, 1, 1], [.1, .4, .35, .8]) == .75
open("r.hea", "w").write("r 1 100 1000")
try: selfmis.read_ecg("r")
except ImportError as error: assert "pip install wfdb" in str(error)
else: raise SystemExit("no error without wfdb")
"""
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nothing_above_the_plumbing_uses_it():
    source = (HERE / "selfmis.py").read_text()
    above = source[: source.index(BANNER)]
    below = ast.parse(source[source.index("\n", len(above)) :])
    names = {node.name for node in below.body if hasattr(node, "name")}
    used = {node.id for node in ast.walk(ast.parse(above)) if isinstance(node, ast.Name)}
    assert len(names) > 15 and not names & used


def test_public_names_have_docstrings_and_the_file_runs_as_help():
    tree = ast.parse((HERE / "selfmis.py").read_text())
    bare = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") and not ast.get_docstring(n)]
    assert bare == []
    done = subprocess.run([sys.executable, str(HERE / "selfmis.py")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Eq. (3)" in done.stdout
