"""What a user can get wrong: one sentence with value, place and remedy, exit code 2, nothing lost.

And what is not a user's fault: a bug keeps its traceback.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import HERE, TINY, TORCHRUN, made_up, run_forked, write_record

import selfmis
from selfmis import RecordError, UsageError, load_ecgfounder, load_encoder, read_ecg
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain
from train_probe import ProbeConfig
from train_probe import main as probe

# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    write_record(tmp_path / "data/r", made_up(1)[0][0])
    return tmp_path / "data/r"


def test_missing_header(tmp_path):
    (tmp_path / "loop.hea").symlink_to("loop.hea")  # stands for all that a disk can say
    with pytest.raises(RecordError, match="loop.hea: cannot be read .Too many levels"):
        read_ecg(tmp_path / "loop")
    with pytest.raises(RecordError, match="nobody.hea: there is no such header file"):
        read_ecg(tmp_path / "nobody")


def test_header_without_signal_file(record):
    os.remove(f"{record}.dat")
    with pytest.raises(RecordError, match="data/r: header or signal file is missing, damaged"):
        read_ecg(record)


@pytest.mark.parametrize("bytes_left", [0, 100, 23_999])
def test_truncated_signal_file(record, bytes_left):
    os.truncate(f"{record}.dat", bytes_left)
    with pytest.raises(RecordError, match="data/r: (header or signal file is|holds no samples)"):
        read_ecg(record)


@pytest.mark.parametrize(
    "text", ["", "r 12 100\n", "\x00\x01", "r twelve 100 1000\n", "r 12 0 1000\n"]
)
def test_broken_header(record, text):
    record.with_name("r.hea").write_text(text)
    with pytest.raises(RecordError, match="data/r") as error:
        read_ecg(record)
    assert len(str(error.value).splitlines()) == 1


def test_missing_lead_names_file_wanted_and_present(tmp_path):
    write_record(tmp_path / "r", made_up(1)[0][0][1:3], ("II", "III"))
    with pytest.raises(RecordError, match="r: no lead I; it has II, III"):
        read_ecg(tmp_path / "r", ("I", "II", "aVR"))


def test_unit_that_is_no_voltage(record):
    header = record.with_name("r.hea")
    header.write_text(header.read_text().replace("/mV", "/mmHg"))
    with pytest.raises(RecordError, match="unit mmHg of I is not a voltage"):
        read_ecg(record)


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        ("hello", "not a checkpoint that can be loaded"),
        (None, "not a checkpoint that can be loaded"),
        ({"x": 1}, "no encoder of selfmis"),
        ({"state_dict": {}}, "ECGFounder file"),
        ({"state_dict": torch.zeros(3)}, "its state_dict is a Tensor, not weights by name"),
        ([1], "holds a list"),
    ],
)
def test_files_that_are_no_encoder(tmp_path, content, message):
    path = tmp_path / "x.pt"
    if isinstance(content, str):
        path.write_text(content)
    elif content is None:
        torch.save({"encoder": torch.zeros(1000)}, path)
        os.truncate(path, 3000)
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match=message):
        load_encoder(path)
    with pytest.raises(UsageError, match="x.pt"):
        load_ecgfounder(path, 1)
    with pytest.raises(UsageError, match="nowhere.pt: there is no such file"):
        load_encoder(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("content", [{}, {"architecture": "resnet50", "state_dict": {"x": 1}}])
def test_a_checkpoint_of_another_version_or_project(tmp_path, tiny, content):
    if not content:
        content = torch.load(tiny[1], weights_only=True)
        del content["training_data"]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="x.pt: no .* as this version writes it; train it"):
        load_encoder(tmp_path / "x.pt")


# --------------------------------------------------------------------------------------------------
# Data and settings
# --------------------------------------------------------------------------------------------------


def both(tmp_path, **settings):
    """The errors of both scripts' main for the same settings."""
    messages = []
    shared = dict(size="small", out=str(tmp_path / "out"), workers=0) | settings
    for main, config in (
        (pretrain, PretrainConfig(multi="random", **shared)),
        (probe, ProbeConfig(**shared)),
    ):
        with pytest.raises(UsageError) as error:
            main(config)
        messages.append(str(error.value))
        assert not (tmp_path / "out").exists() and len(messages[-1].splitlines()) == 1
    return messages


@pytest.mark.parametrize(
    "data, message",
    [
        ("gone", "no such folder; give a folder of records or synthetic:N"),
        ("empty", "no ptbxl_database.csv, record_list.csv or .hea file in it"),
        ("synthetic:", "synthetic:20000"),
        ("synthetic:0", "synthetic:20000"),
        ("synthetic:-3", "synthetic:20000"),
    ],
)
def test_wrong_empty_and_strange_roots(tmp_path, monkeypatch, data, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert all(message in found for found in both(tmp_path, data=[data]))


@pytest.mark.parametrize(
    "part",
    ["..", "records100", "records100/00000", "{mimic}/files", "{mimic}/files/p1000/p10000003/s7"],
)
def test_a_part_of_a_collection_or_its_parent_has_no_folds_and_is_refused(ptbxl, mimic, part):
    data = ptbxl / part.format(mimic=mimic)
    with pytest.raises(UsageError, match="the folder of its ptbxl_database.csv or record_list.csv"):
        selfmis.find_records(str(data), sample_rate_hz=100)


def test_a_collection_without_one_usable_record(tmp_path):
    for i in range(12):
        write_record(tmp_path / f"data/r{i}", made_up(1)[0][0][1:3], ("II", "III"))
    settings = dict(data=[str(tmp_path / "data")], multi="random", size="small", workers=0)
    with pytest.raises(UsageError, match="12 of 12 records.*none is left; the first: .*no lead I"):
        pretrain(PretrainConfig(out=str(tmp_path / "out"), batch_size=8, **settings))
    assert not (tmp_path / "out").exists()


def test_records500_that_are_not_there_are_one_line(tmp_path, ptbxl, capsys):
    with pytest.raises(UsageError, match="80 of 80 records.*records500"):
        probe(ProbeConfig(data=[str(ptbxl)], size="small", out=str(tmp_path / "out"), workers=0))
    assert "cannot be used" not in capsys.readouterr().out


def make_pretrain(tmp_path, ptbxl, tiny, **changed):
    settings = dict(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], out=str(tmp_path / "out"))
    settings |= dict(workers=0, batch_size=16, epochs=1)
    return PretrainConfig(**settings | changed)


def make_probe(tmp_path, ptbxl, tiny, **changed):
    settings = dict(data=[str(ptbxl)], encoder=tiny[1], out=str(tmp_path / "out"))
    return ProbeConfig(**settings | dict(workers=0, epochs=1, batch_size=16) | changed)


@pytest.fixture
def no_reading(monkeypatch):
    """What the tables already say is said before any record is read."""

    def refuse(self, i, *_):
        raise AssertionError(f"{self.name(i)} was read")

    monkeypatch.setattr(selfmis.Records, "read", refuse)


ONE_RECORD = dict(labels=np.zeros((1, 44)), fold=np.zeros(1), patient=np.zeros(1))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "nosuchrun: no readable predictions.npz in it"),
        (b"PK\x03\x04", "nosuchrun: no readable predictions.npz in it"),
        (dict(labels=np.zeros((9, 44))), "nosuchrun: "),
        (ONE_RECORD, "nosuchrun: no logits in its predictions.npz"),
        (
            ONE_RECORD | dict(logits_adam=np.zeros((1, 1, 44))),
            "nosuchrun: it was tested on other records",
        ),
    ],
)
def test_a_bad_compare(tmp_path, ptbxl, tiny, no_reading, content, message):
    (tmp_path / "nosuchrun").mkdir()
    if isinstance(content, dict):
        np.savez(tmp_path / "nosuchrun/predictions.npz", **content)
    else:
        (tmp_path / "nosuchrun/predictions.npz").write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        probe(make_probe(tmp_path, ptbxl, tiny, compare=[str(tmp_path / "nosuchrun")]))
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(single=12), "12 lead"),
        (dict(multi=1), "1 lead"),
        (dict(size="small"), "--size small"),
        (dict(sample_rate=500.0), "sample_rate: 100 in .*500.0 in --sample-rate; they must agree"),
        (dict(normalize="none"), "normalize: zscore in .*none in --normalize"),
        (dict(multi=None), "12_lead_ECGFounder.pth"),
        (dict(lead="all"), "name it"),
    ],
)
def test_encoders_that_do_not_fit(tmp_path, ptbxl, tiny, no_reading, changed, message):
    changed = {name: tiny.get(value, value) for name, value in changed.items()}
    with pytest.raises(UsageError, match=message):
        pretrain(make_pretrain(tmp_path, ptbxl, tiny, **changed))


def test_the_same_number_however_written_agrees():
    assert selfmis.agree("sample_rate", 500.0, {"1_lead_ECGFounder.pth": 500}, 0) == 500


@pytest.mark.parametrize(
    "widths, lead, message",
    [
        ((16, 48), "all", "32 dimensions, --multi in 48"),
        ((16, 32), "I", "was trained on lead I and zeros"),
    ],
)
def test_teachers_that_do_not_fit(tmp_path, ptbxl, tiny, no_reading, widths, lead, message):
    encoder = selfmis.ResNet1D(12, **TINY | dict(widths=widths))
    other = selfmis.encoder_content(encoder, selfmis.InputSpec(lead, 100, {}), [])
    selfmis.save(tmp_path / "other.pt", other)
    with pytest.raises(UsageError, match=message):
        pretrain(make_pretrain(tmp_path, ptbxl, tiny, multi=str(tmp_path / "other.pt")))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epoch", "3"], "unrecognized arguments: --epoch"),  # no abbreviations
        (["--epochs", "0"], "--epochs 0: expected a number above 0"),
        (["--lead", "V7"], "lead 'V7': expected one of I, II"),
        (["--loss", "best"], "invalid choice"),
        (["--lr", "fast"], "invalid float value"),
        (["--test-fold", "9"], "--val-fold and --test-fold are both 9: give two"),
        (["--batch-size", "-4"], "--batch-size -4"),
        (["--resume", "--overwrite"], "choose one"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--warmup", "-5"], "--warmup -5: expected 0 or more"),
        (["--save-seconds", "nan"], "--save-seconds nan: expected 0 or more"),
    ],
)
def test_flags(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        selfmis.parse_flags(PretrainConfig, "", arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("changed", [dict(amp="bf16"), dict(compile=True)])
def test_flags_that_a_frozen_encoder_would_ignore_are_refused(changed):
    with pytest.raises(UsageError, match="--compile, --amp: a frozen encoder runs as it is"):
        ProbeConfig(**changed)


def run_script(monkeypatch, main, *arguments):
    """selfmis.run_script in this process, as `python train_pretrain.py ...`."""

    real, this = os._exit, os.getpid()

    def leave(code):
        if os.getpid() != this:  # a process that reads
            real(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", *map(str, arguments)])
    selfmis.run_script(main, PretrainConfig, "")


def test_the_script_prints_one_sentence_and_exits_with_2(monkeypatch, capsys):
    """As a process of its own: test_standalone.py; as two: below."""
    with pytest.raises(SystemExit) as exit:
        run_script(monkeypatch, pretrain, "--data", "nowhere", "--multi", "random")
    sentence = "error: nowhere: no such folder; give a folder of records or synthetic:N\n"
    assert exit.value.code == 2 and capsys.readouterr() == ("", sentence)


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        run_script(monkeypatch, pretrain, "--data", "nowhere", "--multi", "random", "--debug")


def missing_package(items):
    return selfmis.import_optional("nonesuch.io", "reading records")


def test_an_error_in_a_process_that_reads_is_one_sentence_too(monkeypatch, capsys):
    """Such as a wfdb that is not installed."""
    loader = torch.utils.data.DataLoader(range(3), num_workers=1, collate_fn=missing_package)
    with pytest.raises(SystemExit) as exit:
        run_script(monkeypatch, lambda config: list(loader), "--data", "unused")
    sentence = "error: reading records needs the package nonesuch: pip install nonesuch\n"
    assert (exit.value.code, capsys.readouterr().err) == (2, sentence)


def test_an_odd_record_in_a_run_is_skipped_and_counted(tmp_path, ptbxl, tiny, capsys):
    root = tmp_path / "ptb-xl"
    shutil.copytree(ptbxl, root)
    os.truncate(root / "records100/00000/00003_lr.dat", 1000)
    pretrain(make_pretrain(tmp_path, root, tiny))
    assert "1 of 72 records cannot be used and are left out" in capsys.readouterr().out
    best = torch.load(tmp_path / "out/best.pt", weights_only=True)
    assert np.isfinite(best["metrics"]["val_loss"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["training_records"], config["validation_records"]) == (63, 8)
    assert config["unusable"]["count"] == 1 and "00003_lr" in config["unusable"]["first"][0]


# --------------------------------------------------------------------------------------------------
# --out and --overwrite: nothing is lost
# --------------------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ptbxl, tiny):
    """The folders of a finished pre-training and probe; do not write into them."""
    folder = tmp_path_factory.mktemp("finished")
    pretrain(make_pretrain(folder, ptbxl, tiny, out=str(folder / "pretrain")))
    probe(make_probe(folder, ptbxl, tiny, out=str(folder / "probe")))
    return folder


@pytest.fixture
def runs(finished, tmp_path):
    """A copy of them; fails if a test changes one."""
    shutil.copytree(finished, tmp_path / "runs")
    yield tmp_path / "runs"
    for folder in finished.iterdir():
        if folder.name != "cache":
            assert files(tmp_path / "runs" / folder.name) == files(folder)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(batch_size=65), "64 records do not fill a batch of 1 x 65; lower --batch-size"),
        (dict(multi="nowhere.pt"), "nowhere.pt: there is no such file"),
        (dict(multi=None), "needs a 12-lead teacher"),
        (dict(single="nowhere.pt"), "nowhere.pt: there is no such file"),
        (dict(data=["nowhere"]), "nowhere: no such folder"),
        (dict(limit=8), "0 to validate on"),
        (dict(sample_rate=250.0), "they must agree"),
        (dict(device="mps"), "Metal"),
        (dict(cache="{run}/log.jsonl"), "--cache .*log.jsonl"),
    ],
)
def test_overwrite_removes_nothing_before_a_pretraining_can_start(
    runs, ptbxl, tiny, no_reading, changed, message
):
    out = str(runs / "pretrain")
    if "cache" in changed:
        changed = dict(cache=changed["cache"].format(run=out))
    with pytest.raises(UsageError, match=message):
        pretrain(make_pretrain(runs, ptbxl, tiny, out=out, overwrite=True, **changed))


@pytest.mark.parametrize("fold, message", [(0, "63 records do not fill a batch"), (8, "validate")])
def test_overwrite_removes_nothing_where_unusable_records_leave_too_few(
    tmp_path, runs, ptbxl, tiny, fold, message
):
    """One of 64 that fill a batch, or all that would validate."""
    root = tmp_path / "ptb-xl"
    shutil.copytree(ptbxl, root)
    for i in [0] if fold == 0 else range(8, 80, 10):
        os.remove(root / f"records100/00000/{i:05}_lr.dat")
    settings = dict(out=str(runs / "pretrain"), overwrite=True, batch_size=64)
    settings |= dict(cache=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=message):
        pretrain(make_pretrain(runs, root, tiny, **settings))


@pytest.mark.parametrize(
    "main, make, flag, file",
    [
        (pretrain, make_pretrain, "single", "pretrain/best.pt"),
        (probe, make_probe, "encoder", "pretrain/best.pt"),
        (probe, make_probe, "compare", "probe"),
    ],
)
def test_overwrite_does_not_remove_what_the_run_itself_is_given(
    runs, ptbxl, tiny, main, make, flag, file
):
    value = str(runs / file)
    settings = {flag: [value] if flag == "compare" else value}
    settings |= dict(out=str(runs / file.split("/")[0]), overwrite=True)
    with pytest.raises(UsageError, match=f"--{flag}"):
        main(make(runs, ptbxl, tiny, **settings))


def test_overwrite_takes_what_lies_in_the_run_s_folder_but_is_no_file_of_a_run(
    tmp_path, ptbxl, tiny, monkeypatch
):
    pretrain(make_pretrain(tmp_path, ptbxl, tiny))
    shutil.copy(tiny[12], tmp_path / "out/teacher.pt")
    monkeypatch.chdir(tmp_path / "out")
    settings = dict(out=".", multi="teacher.pt", single="random", overwrite=True, cache="none")
    assert pretrain(make_pretrain(tmp_path, ptbxl, tiny, **settings))["epoch"] == 1


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b'{"mine": 1}'),
        ("config.json", b"not even JSON"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[1]"),
        ("results.md", b"my results"),
        ("best.pt", b"somebody's weights"),
    ],
)
def test_a_foreign_file_is_never_removed(tmp_path, ptbxl, tiny, name, content, flag):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    for main, make in ((pretrain, make_pretrain), (probe, make_probe)):
        with pytest.raises(UsageError, match=f"holds {name} of no run; give another --out"):
            main(make(tmp_path, ptbxl, tiny, **{flag: True}))
        with pytest.raises(UsageError, match=f"holds {name} of no run; give another --out"):
            main(make(tmp_path, ptbxl, tiny))
    assert files(tmp_path / "out") == {name: content}


def test_a_second_run_is_refused_and_overwrite_removes_only_a_run(tmp_path, ptbxl, tiny):
    pretrain(make_pretrain(tmp_path, ptbxl, tiny))
    (tmp_path / "out/notes.txt").write_text("mine")
    before = files(tmp_path / "out")
    with pytest.raises(UsageError, match="holds a run; give another, or --resume or --overwrite"):
        pretrain(make_pretrain(tmp_path, ptbxl, tiny))
    assert files(tmp_path / "out") == before
    pretrain(make_pretrain(tmp_path, ptbxl, tiny, seed=1, overwrite=True))
    after = files(tmp_path / "out")
    assert after["notes.txt"] == b"mine" and after["last.pt"] != before["last.pt"]
    assert len(after["log.jsonl"].splitlines()) == 1
    probe(make_probe(tmp_path, ptbxl, tiny, overwrite=True))  # another kind of run
    after = files(tmp_path / "out")
    assert "probe.pt" in after and "best.pt" not in after and after["notes.txt"] == b"mine"


def test_a_folder_that_cannot_be_written(tmp_path, ptbxl, tiny):
    (tmp_path / "file").write_text("")
    for out, message in (
        ("file", "--out .*file: is a file, not a folder"),
        ("file/out", "--(out|cache) .*file/(out|cache): Not a directory; give another"),
    ):
        with pytest.raises(UsageError, match=message):
            pretrain(make_pretrain(tmp_path, ptbxl, tiny, out=str(tmp_path / out)))


# --------------------------------------------------------------------------------------------------
# A bug is no usage error
# --------------------------------------------------------------------------------------------------


def buggy_forward(self, x, real=selfmis.ResNet1D.forward):
    return real(self, x) @ torch.zeros(7, 7)


def buggy_preprocess(ecg, *, real=selfmis.preprocess, **settings):
    return real(ecg, **settings) + None


BUGS = {
    "forward": (selfmis.ResNet1D, buggy_forward, RuntimeError, "mat1 and mat2 shapes cannot be"),
    "preprocess": (selfmis, buggy_preprocess, TypeError, "unsupported operand type"),
}


def buggy_flags(tmp_path, ptbxl, tiny, workers):
    flags = f"--data {ptbxl} --single {tiny[1]} --multi {tiny[12]} --batch-size 8 --epochs 1"
    return f"{flags} --workers {workers} --out {tmp_path}/out --cache none".split()


@pytest.mark.parametrize("bug, workers", [("forward", 0), ("preprocess", 0), ("preprocess", 2)])
def test_a_bug_keeps_its_traceback(tmp_path, ptbxl, tiny, monkeypatch, capfd, bug, workers):
    """In this process and in one that reads."""
    owner, buggy, kind, message = BUGS[bug]
    monkeypatch.setattr(owner, bug, buggy)
    with pytest.raises(kind, match=message) as error:
        run_script(monkeypatch, pretrain, *buggy_flags(tmp_path, ptbxl, tiny, workers))
    assert not isinstance(error.value, UsageError)
    text = "".join(capfd.readouterr())
    assert "left out" not in text and "cannot be used" not in text and "error:" not in text


def assert_traceback(bug, out, err):
    _, buggy, kind, message = BUGS[bug]
    assert "Traceback (most recent call last)" in err and f"in {buggy.__name__}\n" in err
    assert f"{kind.__name__}: {message}" in err and "\nerror: " not in err
    assert "left out" not in out and "cannot be used" not in out


def test_a_bug_keeps_its_traceback_under_torchrun(tmp_path, ptbxl, tiny):
    """torchrun starts this file, see below."""
    done = subprocess.run(
        [*TORCHRUN, "2", __file__, *buggy_flags(tmp_path, ptbxl, tiny, 0)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert_traceback("forward", done.stdout, done.stderr)


def run_in_a_fork(arguments):
    """Of each of two processes: train_pretrain.py with the bug that comes first, if any."""
    bug, *arguments = arguments
    if bug in BUGS:
        owner, buggy, _, _ = BUGS[bug]
        setattr(owner, bug, buggy)
    sys.argv = ["train_pretrain.py", *arguments]
    selfmis.run_script(pretrain, PretrainConfig, "")


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_keeps_its_traceback_in_each_of_two_processes(tmp_path, ptbxl, tiny, capfd, bug):
    arguments = buggy_flags(tmp_path, ptbxl, tiny, 0)
    assert run_forked(2, run_in_a_fork, [bug, *arguments]) == [1, 1]
    text = capfd.readouterr()
    assert_traceback(bug, text.out, text.err)
    assert text.err.count(f"{BUGS[bug][2].__name__}: ") == 2


def test_a_usage_error_is_one_sentence_in_each_of_two_processes(tmp_path, ptbxl, tiny, capfd):
    arguments = [*buggy_flags(tmp_path, ptbxl, tiny, 0), "--limit", "8"]
    assert run_forked(2, run_in_a_fork, ["no bug", *arguments]) == [2, 2]
    err = capfd.readouterr().err
    sentence = "error: 8 records to train and 0 to validate on: give more --data or a larger"
    assert err.count(sentence) == err.count("error:") == 2 and "Traceback" not in err


if __name__ == "__main__":
    selfmis.ResNet1D.forward = buggy_forward
    selfmis.run_script(pretrain, PretrainConfig, "")
