"""What a user can get wrong: one sentence with the value, the place and the remedy, exit code 2, nothing lost."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import HERE, TINY, made_up, run, write_record

import selfmis
from selfmis import load_ecgfounder, load_encoder, read_ecg
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain
from train_probe import ProbeConfig
from train_probe import main as probe


@pytest.fixture
def record(tmp_path):
    write_record(tmp_path / "data/r", made_up(1)[0][0])
    return tmp_path / "data/r"


def test_missing_header(tmp_path):
    with pytest.raises(ValueError, match="nobody.hea: there is no such header file"):
        read_ecg(tmp_path / "nobody")


def test_header_without_signal_file(record):
    os.remove(f"{record}.dat")
    with pytest.raises(ValueError, match=r"data/r: cannot be read \(FileNotFoundError"):
        read_ecg(record)


@pytest.mark.parametrize("bytes_left", [0, 100, 23_999])
def test_truncated_signal_file(record, bytes_left):
    os.truncate(f"{record}.dat", bytes_left)
    with pytest.raises(ValueError, match="data/r: (cannot be read|holds no samples)"):
        read_ecg(record)


@pytest.mark.parametrize("text", ["", "r 12 100\n", "\x00\x01", "r twelve 100 1000\n", "r 12 0 1000\n"])
def test_broken_header(record, text):
    with open(f"{record}.hea", "w") as file:
        file.write(text)
    with pytest.raises(ValueError, match="data/r"):
        read_ecg(record)


def test_missing_lead_names_file_wanted_and_present(tmp_path):
    write_record(tmp_path / "r", made_up(1)[0][0][1:3], ("II", "III"))
    with pytest.raises(ValueError, match="r: no lead I, aVR; it has II, III"):
        read_ecg(tmp_path / "r", ("I", "II", "aVR"))


def test_unit_that_is_no_voltage(record):
    text = open(f"{record}.hea").read().replace("/mV", "/mmHg")
    open(f"{record}.hea", "w").write(text)
    with pytest.raises(ValueError, match="unit mmHg is not a voltage"):
        read_ecg(record)


@pytest.mark.parametrize("content, said", [("hello", "not a readable checkpoint"), (None, "not a readable checkpoint"), ({"x": 1}, "no encoder of selfmis"), ({"state_dict": {}}, "ECGFounder file"), ([1], "holds a list")])
def test_files_that_are_no_encoder(tmp_path, content, said):
    path = tmp_path / "x.pt"
    if isinstance(content, str):
        path.write_text(content)
    else:
        torch.save({"encoder": torch.zeros(1000)} if content is None else content, path)
        if content is None:
            os.truncate(path, 3000)
    with pytest.raises(ValueError, match=said):
        load_encoder(path)
    with pytest.raises(ValueError, match="x.pt"):
        load_ecgfounder(path, 1)
    with pytest.raises(ValueError, match="nowhere.pt: there is no such file"):
        load_encoder(tmp_path / "nowhere.pt")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"encoder": Evil()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_encoder(tmp_path / "x.pt")
    assert not (tmp_path / "pwned").exists()


def both(tmp_path, **settings):
    """The error of both scripts' main for the same settings."""
    said = []
    for Config, main, more in ((PretrainConfig, pretrain, dict(multi="random")), (ProbeConfig, probe, {})):
        with pytest.raises(ValueError) as error:
            main(Config(**dict(size="small", out=str(tmp_path / "out"), workers=0) | more | settings))
        said.append(str(error.value))
        assert not (tmp_path / "out/last.pt").exists() and len(said[-1].splitlines()) == 1
    return said


def test_wrong_empty_and_strange_roots(tmp_path):
    (tmp_path / "empty").mkdir()
    for data, want in ((tmp_path / "gone", "there is no such folder"), (tmp_path / "empty", "no ptbxl_database.csv, no record_list.csv and no .hea"), ("synthetic:", "synthetic:20000"), ("synthetic:0", "synthetic:20000")):
        assert all(want in said for said in both(tmp_path, data=[str(data)]))
        assert not (tmp_path / "out").exists()


def test_a_part_of_a_collection_or_its_parent_has_no_folds_and_is_refused(tmp_path, ptbxl, mimic):
    for data in (ptbxl.parent, ptbxl / "records100", ptbxl / "records100/00000", mimic / "files", mimic / "files/p1000/p10000003/s7"):
        with pytest.raises(ValueError, match="give the folder of its ptbxl_database.csv or record_list.csv"):
            selfmis.find_records(str(data), sample_rate_hz=100)


def test_an_error_in_a_process_that_reads_is_one_sentence_too(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import selfmis, torch; from train_pretrain import PretrainConfig\n"
    code += "loader = torch.utils.data.DataLoader(range(3), num_workers=1, collate_fn=lambda items: selfmis.read_ecg('nobody'))\n"
    code += "selfmis.run_script(lambda config: list(loader), PretrainConfig, '')"
    done = subprocess.run([sys.executable, "-c", code, str(HERE)], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (2, "error: nobody.hea: there is no such header file\n")


def test_csv_without_its_columns_or_rows(tmp_path):
    (tmp_path / "record_list.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column path, subject_id; it has a, b"):
        selfmis.find_records(str(tmp_path))
    (tmp_path / "record_list.csv").write_text("path,subject_id\n")
    with pytest.raises(ValueError, match="lists no record"):
        selfmis.find_records(str(tmp_path))


def test_a_collection_without_one_usable_record(tmp_path):
    for i in range(12):
        write_record(tmp_path / f"data/r{i}", made_up(1)[0][0][1:3], ("II", "III"))
    with pytest.raises(ValueError, match="training: none of 11 records can be used; the first: .*no lead I"):
        pretrain(PretrainConfig(data=[str(tmp_path / "data")], multi="random", size="small", out=str(tmp_path / "out"), workers=0))


def test_records500_that_are_not_there_are_one_line(tmp_path, ptbxl, capsys):
    with pytest.raises(ValueError, match="none of 80 records.*records500"):
        probe(ProbeConfig(data=[str(ptbxl)], size="small", out=str(tmp_path / "out"), workers=0))
    assert capsys.readouterr().out.count("cannot be used") == 1


def test_fewer_records_than_a_batch(tmp_path, ptbxl, tiny):
    with pytest.raises(ValueError, match="64 usable training records do not fill one batch of 1 x 128"):
        pretrain(PretrainConfig(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], out=str(tmp_path / "out"), workers=0))


def test_probing_needs_labels(tmp_path, mimic, tiny):
    with pytest.raises(ValueError, match="probing needs labels"):
        probe(ProbeConfig(data=[str(mimic)], encoder=tiny[1], out=str(tmp_path / "out"), workers=0))


def test_encoders_that_do_not_fit(tmp_path, ptbxl, tiny):
    make = lambda **changed: PretrainConfig(**dict(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], out=str(tmp_path / "out"), workers=0) | changed)
    for changed, said in (
        (dict(single=tiny[12]), "12 lead"),
        (dict(multi=tiny[1]), "1 lead"),
        (dict(size="small"), "--size small"),
        (dict(sample_rate=500.0), "sample-rate: 100 in .*500.0 in --sample-rate; they must agree"),
        (dict(normalize="none"), "normalize: zscore in .*none in --normalize"),
        (dict(multi=None), "12_lead_ECGFounder.pth"),
        (dict(lead="all"), "name it"),
    ):
        with pytest.raises(ValueError, match=said):
            pretrain(make(**changed))
    assert selfmis.resolve("sample-rate", 500.0, {"1_lead_ECGFounder.pth": 500}, 0) == 500  # the same number, however written
    other = selfmis.encoder_content(selfmis.ResNet1D(12, **TINY | dict(widths=(16, 48))), selfmis.View("all", 100, {}), [])
    selfmis.save(tmp_path / "other.pt", other)
    with pytest.raises(ValueError, match="32 dimensions, --multi in 48"):
        pretrain(make(multi=str(tmp_path / "other.pt")))


@pytest.mark.parametrize("arguments, said", [
    (["--epoch", "3"], "unrecognized arguments: --epoch"),  # no abbreviations
    (["--epochs", "0"], "--epochs 0: expected a number above 0"),
    (["--lead", "V7"], "lead 'V7': expected one of I, II"),
    (["--loss", "best"], "invalid choice"),
    (["--lr", "fast"], "invalid float value"),
    (["--test-fold", "9"], "two different folds"),
    (["--batch-size", "-4"], "--batch-size -4"),
    (["--resume", "--overwrite"], "choose one"),
    (["--seed", "-1"], "--seed -1: expected 0 or more"),
    (["--warmup", "-5"], "--warmup -5: expected 0 or more"),
])  # fmt: skip
def test_flags(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit:
        selfmis.parse_flags(PretrainConfig, "", arguments)
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_the_script_prints_one_sentence_exits_with_2_and_debug_shows_the_traceback(tmp_path):
    done = run("train_probe.py", "--data", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == "error: nowhere: there is no such folder; give a folder of records or synthetic:N\n"
    done = run("train_probe.py", "--data", "nowhere", "--debug", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_folder_that_cannot_be_written(tmp_path, ptbxl, tiny):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        pretrain(PretrainConfig(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], batch_size=16, out=str(tmp_path / "file"), workers=0))


def test_an_odd_record_in_a_run_is_skipped_and_counted(tmp_path, ptbxl, tiny, capsys):
    root = tmp_path / "ptb-xl"
    shutil.copytree(ptbxl, root)
    os.truncate(root / "records100/00000/00003_lr.dat", 1000)
    pretrain(PretrainConfig(data=[str(root)], single=tiny[1], multi=tiny[12], batch_size=16, epochs=1, out=str(tmp_path / "out"), workers=0))
    assert "training: 1 of 64 records cannot be used and are left out" in capsys.readouterr().out
    assert np.isfinite(torch.load(tmp_path / "out/best.pt", weights_only=True)["metrics"]["val_loss"])
