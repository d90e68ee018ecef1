"""extras/ship.py and the detector that comes with the repository.

With SELFMIS_PTBXL=/path/to/ptb-xl its AUC on fold 9 is also measured.
"""

import os
import re

import numpy as np
import pytest
import torch
from conftest import made_up, write_record
from probes import write_probe

import selfmis
from extras import detect, ship
from extras.synthetic import synthesize
from selfmis import MI_TYPES, STATEMENTS, UsageError

ROOT = os.environ.get("SELFMIS_PTBXL")
# fmt: off
ANSWERS = [  # to `synthesize(3, seed=0, sample_rate_hz=100)`, in the order of MI_TYPES
    [0.0051, 0.0187, 0.0660, 0.0141, 0.2219, 0.0048, 0.0023, 0.0026, 0.0019],
    [0.0040, 0.0030, 0.0069, 0.0071, 0.0119, 0.0009, 0.0004, 0.0072, 0.0003],
    [0.0030, 0.0039, 0.0097, 0.0112, 0.0722, 0.0013, 0.0006, 0.0025, 0.0006],
]
# fmt: on


@pytest.fixture(scope="module")
def shipped():
    return detect.load_detector()


def test_it_fits_into_the_repository_and_says_what_it_has_seen(shipped):
    assert detect.WEIGHTS.stat().st_size < 9e6
    content = shipped.content
    assert {value.dtype for value in content["encoder"].values()} == {torch.float16}
    assert {p.dtype for p in shipped.classifier.parameters()} == {torch.float32}
    folds = {entry["use"]: entry["folds"] for entry in content["head_training_data"]}
    assert folds == {"training": [1, 2, 3, 4, 5, 6, 7], "validation": [8]}
    assert content["config"]["test_fold"] == 9
    assert content["handheld"]["recordings"] == 5038
    # No folder of the machine that made it.
    assert not re.search(r"['\"]/", repr(content["config"]))
    assert content["config"]["data"] == ["ptb-xl"]


def test_its_answers_are_those_it_had_when_it_was_made(shipped):
    ecg, _ = synthesize(3, seed=0, sample_rate_hz=100)
    found = np.stack(list(shipped(ecg[:, :1], 100).values()), 1)  # (3, 9)
    np.testing.assert_allclose(found, ANSWERS, atol=1e-3)


def test_detect_without_a_probe_answers_by_it_and_says_so(tmp_path, capsys):
    write_record(tmp_path / "a", made_up(1)[0][0, :1], ("I",))
    detect.main([str(tmp_path / "a.hea")])
    out = capsys.readouterr().out
    assert out.startswith("lead_I_small.pt trained on: ptb-xl, ")
    assert (
        "27% of 5,038 normal rhythms on a hand-held device were positive, so that there 7%" in out
    )


@pytest.mark.skipif(not ROOT, reason="SELFMIS_PTBXL names no PTB-XL root")
def test_its_auc_on_the_test_fold_is_the_one_it_tells(shipped):
    records = selfmis.find_records(ROOT, sample_rate_hz=100)
    records = records[(records.folds == 9) & records.labels.any(1)]
    told = shipped.content["results"]["types"]
    if len(records) < 2000:
        pytest.skip(f"only {len(records)} records of fold 9 are there")
    signals = np.stack([records.read(i, ("I",), 100) for i in range(len(records))])
    found = shipped(signals, 100)
    for t in ("ALMI", "AMI", "ASMI", "ILMI", "IMI", "LMI"):
        labels = records.labels[:, STATEMENTS.index(t)]
        assert labels.sum() == told[t]["positives"]
        assert selfmis.roc_auc(labels, found[t]) == pytest.approx(told[t]["auc"], abs=2e-3)


def test_half_the_space_the_same_answers(tmp_path):
    probe = write_probe(tmp_path / "probe.pt")
    selfmis.save(tmp_path / "half.pt", ship.halve(selfmis.read_checkpoint(probe)))
    x = made_up(4)[0][:, :1]
    whole, half = (detect.load_detector(path)(x, 100) for path in (probe, tmp_path / "half.pt"))
    for t in MI_TYPES:
        np.testing.assert_allclose(half[t], whole[t], atol=5e-3)
    assert any((half[t] != whole[t]).any() for t in MI_TYPES)


def test_what_it_does_on_a_hand_held_device_is_counted_among_normal_records(tmp_path):
    x, _ = made_up(12)
    lines = []
    for i in range(12):
        write_record(tmp_path / f"R{i:02}", x[i, :1], ("I",))
        lines.append(f"R{i:02},{'AN'[i % 2]}")
    (tmp_path / "REFERENCE.csv").write_text("\n".join(lines))
    probe = write_probe(tmp_path / "probe.pt")
    detector = detect.load_detector(probe)
    point = detect.operating_point(detector.content)
    scores = [1 - np.prod([1 - p for p in detector(x[i, :1], 100).values()]) for i in range(12)]
    positive = np.mean(np.array(scores)[1::2] >= point["threshold"])
    found = ship.handheld_rate(probe, ship.normal_recordings(tmp_path))
    assert found == {"recordings": 6, "positive": positive}
    write_record(tmp_path / "other/R00", x[0, :1], ("I",))
    (tmp_path / "other/REFERENCE.csv").write_text("R00,A\n")
    with pytest.raises(UsageError, match="labels no record N"):
        ship.normal_recordings(tmp_path / "other")
    write_record(tmp_path / "short/R00", x[0, :1, :200], ("I",))
    (tmp_path / "short/REFERENCE.csv").write_text("R00,N\n")
    with pytest.raises(UsageError, match="short/R00: 2.00 s of ECG is too short"):
        ship.normal_recordings(tmp_path / "short")


def test_it_ships_what_three_runs_of_table_1_have_made_and_measures_that(
    tmp_path, monkeypatch, capsys
):
    out, weights, started = tmp_path / "runs", tmp_path / "weights.pt", []
    (out / "recorders-0-probe").mkdir(parents=True)
    write_probe(out / "recorders-0-probe/probe.pt")

    def run_chains(runs, folder, jobs):
        started.extend(runs)

    def rate(path, recordings):
        kinds = {value.dtype for value in selfmis.read_checkpoint(path)["encoder"].values()}
        assert (recordings, kinds) == ("device", {torch.float16})
        return dict(recordings=1234, positive=0.25)

    monkeypatch.setattr(ship, "WEIGHTS", weights)
    monkeypatch.setattr(ship.table1, "run_chains", run_chains)
    monkeypatch.setattr(ship, "normal_recordings", lambda folder: folder.name)
    monkeypatch.setattr(ship, "handheld_rate", rate)
    ship.main(["anywhere", "--handheld", "device", "--out", str(out)])
    assert tuple(started) == ship.RUNS
    content = selfmis.read_checkpoint(weights)
    assert content["handheld"] == dict(recordings=1234, positive=0.25)
    said = "on a hand-held device 25.0% of 1,234 normal rhythms are called positive"
    assert said in capsys.readouterr().out
    assert content["config"]["data"] == ["ptb-xl"]
