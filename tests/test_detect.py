"""Detection: windows and calibration, the verdict and its false alarms, the command, the page.

With SELFMIS_PTBXL=/path/to/ptb-xl the false alarms are also counted on real normal records.
"""

import gzip
import io
import json
import math
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import made_up, write_record
from probes import (
    KINDS,
    NINE,
    PTBXL_DATA,
    by_hand,
    call,
    changed,
    probabilities,
    results_of,
    rows_of,
    run_module,
    strict_json,
    usual_fold,
    validation_fold,
    write_probe,
)

import extras.detect
import selfmis
import train_probe
from extras.detect import load_detector, make_answer, operating_point, verdict_lines
from selfmis import LEADS, MI_TYPES, STATEMENTS, UsageError
from train_probe import ProbeConfig


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """{name: probe.pt} of one lead, of twelve, of one of twelve, and without z-score."""
    folder = tmp_path_factory.mktemp("probes")
    return {name: write_probe(folder / f"{name}.pt", **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def source():
    """Two patients, 20 s at 500 Hz in mV."""
    return made_up(2, rate=500, seconds=20, seed=3)[0].astype(float)


@pytest.fixture(scope="module")
def record(tmp_path_factory, source):
    """The first patient as a WFDB record."""
    path = tmp_path_factory.mktemp("record") / "r"
    write_record(path, source[0], rate=500)
    return path


def detect(capsys, probe, *arguments):
    """(exit code, printed, error lines) of the command."""
    return call(extras.detect.main, capsys, *arguments, "--probe", probe)


def answers(capsys, probe, *arguments):
    """{file: its entry} of a call with --json in which everything could be read."""
    code, out, errors = detect(capsys, probe, *arguments, "--json")
    assert (code, errors) == (0, [])
    return {entry["file"]: entry for entry in strict_json(out)["recordings"]}


def write_text(path, header, x):
    path.write_text("\n".join([*header, *(f"{v:.4f}" for v in x), ""]))
    return path


# --- from a signal to probabilities ---


@pytest.mark.parametrize("name", KINDS)
def test_probabilities_are_the_mean_over_windows_of_the_calibrated_head(probes, name):
    """Three windows, the last overlapping; a flat one left out; a short one as it is."""
    detector = load_detector(probes[name])
    x = made_up(1, seconds=26, seed=4)[0][0][rows_of(detector.leads)].astype(float)
    assert detector.leads == (LEADS if name == "twelve" else ("I",))
    assert detector.sample_rate_hz == 100

    def cut(start, stop):
        normalize = "none" if name == "raw" else "zscore"
        return selfmis.preprocess(x[:, start:stop], sample_rate_hz=100, normalize=normalize)

    def close(found, windows, atol=1e-5):
        np.testing.assert_allclose(list(found.values()), by_hand(probes[name], windows), atol=atol)

    close(detector(x, 100), [cut(0, 1000), cut(800, 1800), cut(1600, 2600)])
    close(detector(x[:, :430], 100), [cut(0, 430)[:, :430]])  # as it is, without zeros
    ends = [by_hand(probes[name], [cut(start, start + 1000)]) for start in (0, 1600)]
    assert np.abs(ends[0] - ends[1]).max() > 0.02
    flat = np.concatenate([x[:, :1000], np.full((len(x), 1000), 0.2)], 1)
    close(detector(flat, 100), [cut(0, 1000)])
    # At other rates too, where the filter leaves something of the ECG in the flat window.
    for rate in (250, 500, 512):
        faster = selfmis.resample(x[:, :2000], 100, rate)
        gap = np.concatenate([faster, np.full((len(x), 20 * rate), 0.2), faster], 1)
        close(detector(gap, rate), [cut(0, 1000), cut(1000, 2000)], atol=6e-3)
    found = detector(x, 100)
    assert list(found) == list(MI_TYPES) and all(type(p) is float for p in found.values())
    if name == "twelve":  # one dead electrode is no flat recording
        x[11] = 0
        close(detector(x[:, :1000], 100), [cut(0, 1000)])


def test_missing_samples_are_bridged_or_take_the_median(probes):
    """An offset does not count: 50 missing samples on 5 mV would shrink the ECG to a fifth."""
    detector = load_detector(probes["one"])
    x = made_up(1, rate=500, seconds=10, seed=4)[0][0, 0].astype(float)
    filled = x.copy()
    filled[700:705] = np.linspace(x[699], x[705], 7)[1:-1]
    holes = x.copy()
    holes[700:705], holes[1000:1050] = np.nan, np.inf
    filled[1000:1050] = np.median(holes[np.isfinite(holes)])
    want = np.array(list(detector(filled, 500).values()))
    for offset in (0, 5, -300):
        found = list(detector(holes + offset, 500).values())
        np.testing.assert_allclose(found, want, atol=1e-3)


def test_windows_that_hold_no_ecg_are_left_out_and_a_spike_hides_none(probes):
    detector = load_detector(probes["one"])
    x = made_up(1, seconds=30, seed=4)[0][0, :1].astype(float)
    x[:, 2000:] = 0.002 * np.random.default_rng(0).standard_normal(1000)  # nobody touches it
    assert list(detector(x, 100).values()) == list(detector(x[:, :2000], 100).values())
    (sentence,) = extras.detect.length_warnings(30, len(detector.windows(x, 100)))
    assert sentence.endswith("the answer is the mean of 2 such windows, the other 1 hold no ECG")
    x[:, 2500] = 100
    assert len(detector.windows(x[:, :2000], 100)) == 2 == len(detector.windows(x, 100))


@pytest.mark.parametrize("seconds", [11, 14, 20, 24, 27])
def test_every_second_of_a_recording_counts(probes, seconds):
    detector, x = load_detector(probes["one"]), made_up(1, seconds=seconds, seed=4)[0][0, 0]
    before = np.array(list(detector(x, 100).values()))
    for second in range(seconds):
        other = x.copy()
        other[100 * second : 100 * second + 100] += np.hanning(100)
        after = np.array(list(detector(other, 100).values()))
        assert np.abs(after - before).max() > 1e-4, second


@pytest.mark.parametrize("name", ["one", "twelve"])
def test_a_batch_equals_one_by_one(probes, name):
    detector = load_detector(probes[name])
    x = made_up(5, rate=250, seconds=17, seed=6)[0][:, rows_of(detector.leads)]
    together = detector(x, 250)
    assert all(p.shape == (5,) for p in together.values()) and np.ptp(together["IMI"]) > 0.02
    x[2] = 0.3
    flat = detector(x, 250)
    for t in MI_TYPES:
        assert np.isnan(flat[t][2])  # of one recording it is an error
        np.testing.assert_allclose(np.delete(flat[t], 2), np.delete(together[t], 2), atol=1e-6)
    x = np.delete(x, 2, 0)
    together = {t: np.delete(p, 2) for t, p in together.items()}
    for i, ecg in enumerate(x):
        alone = list(detector(ecg, 250).values())
        np.testing.assert_allclose([together[t][i] for t in MI_TYPES], alone, atol=1e-5)
    if name == "one":
        assert detector(x[0, 0], 250) == detector(x[0], 250)


def test_more_windows_than_one_pass_takes_are_all_scored(probes):
    detector, x = load_detector(probes["one"]), made_up(66, seconds=3, seed=6)[0][:, :1]
    together = np.stack(list(detector(x, 100).values()), 1)
    assert together.shape == (66, 9)
    for i in (0, 1, 63, 64, 65):
        np.testing.assert_allclose(together[i], list(detector(x[i], 100).values()), atol=1e-5)


def test_any_rate_gives_the_same_probabilities(probes, source):
    detector = load_detector(probes["one"])
    x = source[0, :1, :5000]
    truth = np.array(list(detector(x, 500).values()))
    for rate in (100, 128, 250, 333.3, 360, 512, 1000):
        p = list(detector(selfmis.resample(x, 500, rate), rate).values())
        np.testing.assert_allclose(p, truth, atol=2e-3, err_msg=str(rate))


def test_what_a_detector_refuses(probes):
    one, twelve = load_detector(probes["one"]), load_detector(probes["twelve"])
    x = made_up(1)[0][0]
    for detector, ecg, rate, sentence in (
        (one, x, 100, r"shape \(12, 1000\) .*: expected numbers in mV, \(1, samples\)"),
        (twelve, x[0], 100, r"shape \(1000,\) .*: expected numbers in mV, \(12, samples\)"),
        (one, np.zeros((2, 2, 1, 1000)), 100, "shape"),
        (one, np.float64(3), 100, "shape"),
        (one, [], 100, r"shape \(0,\)"),
        (one, np.zeros((1, 0)), 100, r"shape \(1, 0\)"),
        (one, np.zeros((0, 1, 1000)), 100, r"shape \(0, 1, 1000\)"),
        (one, [[1.0, 2.0], [3.0]], 100, "several lengths"),
        (one, "ecg.csv", 100, "type <U7"),
        (one, None, 100, "type object"),
        (one, x[0] + 1j, 100, "type complex"),
        (one, x[0, :240], 100, "2.40 s of ECG is too short"),
        (one, np.zeros(3000), 100, "flat"),
        (one, np.full(3000, np.nan), 100, "flat"),
        (one, np.full(5120, 0.3), 512, "flat"),
        (one, x[0], 0, "sample rate of 0 Hz"),
        (one, x[0], math.nan, "sample rate of nan Hz"),
        (one, x[0], None, "sample rate of None Hz"),
        (one, x[0], "500", "sample rate of 500 Hz"),
    ):
        with pytest.raises(UsageError, match=sentence):
            detector(ecg, rate)
    assert one(x[0].tolist(), 100) == one(x[0].astype(float), 100)


@pytest.mark.parametrize(
    "kind", ["encoder", "text", "folder", "nothing", "no calibration", "ecgfounder", "number"]
)
def test_a_wrong_probe_file_is_one_sentence(tmp_path, probes, tiny, record, capsys, kind):
    path = tmp_path / "probe.pt"
    if kind == "encoder":
        path = tiny[1]
    elif kind == "text":
        path.write_text("hello\n" * 50)
    elif kind == "folder":
        path.mkdir()
    elif kind == "no calibration":
        content = torch.load(probes["one"], weights_only=True)
        torch.save({k: v for k, v in content.items() if k != "validation"}, path)
    elif kind == "ecgfounder":
        torch.save({"state_dict": {}}, path)
    elif kind == "number":
        torch.save(torch.zeros(3), path)
    code, out, errors = detect(capsys, path, record)
    assert (code, out, len(errors)) == (2, "", 1) and errors[0].startswith(f"error: {path}: ")


# --- one verdict ---


def of(fold):
    """What `operating_point` reads of a probe with this validation fold."""
    return {"validation": fold, "lead": "I"}


@pytest.mark.parametrize("specificity", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_the_threshold_against_all_thresholds(specificity):
    """Tied scores: of all thresholds that keep the promise on the fold, the most sensitive one."""
    rng = np.random.default_rng(0)
    for trial in range(60):
        n = int(rng.integers(60, 200))
        kind = rng.integers(0, 3, n)
        score = np.float32(rng.integers(0, [3, 10, 100, 10**6][trial % 4], n) + kind) / 7
        point = operating_point(of(validation_fold(score, kind == 0, kind == 1)), specificity)
        infarct, normal, other = (score[kind == k].astype(float) for k in range(3))
        tried = [float(t) for t in set(score.tolist())] + [score.max() + 1.0]
        kept = [t for t in tried if (normal >= t).sum() <= (1 - specificity) * len(normal) + 1e-9]
        assert point["false_alarms_normal"] <= 1 - specificity + 1e-9
        assert point["sensitivity"] == max((infarct >= t).mean() for t in kept)
        at = point["threshold"]
        assert point["sensitivity"] == (infarct >= at).mean()
        assert point["false_alarms_normal"] == (normal >= at).mean()
        assert point["false_alarms_other"] == (other >= at).mean()
        counts = {"infarct": len(infarct), "normal": len(normal), "other": len(other)}
        assert point["validation_records"] == counts
        assert at not in score.astype(float)  # so that rounding decides nothing


def test_ties_do_not_raise_the_false_alarms():
    """Half of the normal records have the same score: they are all below the threshold."""
    score = np.r_[np.full(20, 0.9), np.full(50, 0.3), np.linspace(0, 0.2, 50)]
    infarct = np.arange(120) < 20
    point = operating_point(of(validation_fold(score, infarct, ~infarct)), 0.9)
    assert 0.3 < point["threshold"] < 0.9
    assert (point["sensitivity"], point["false_alarms_normal"]) == (1, 0)
    assert point["false_alarms_other"] is None
    same = operating_point(of(validation_fold(np.full(120, 0.5), infarct, ~infarct)), 0.9)
    assert same["threshold"] > 0.5 and same["sensitivity"] == 0
    assert same["predictive_value"] is None


ROOT = os.environ.get("SELFMIS_PTBXL")


@pytest.mark.skipif(not ROOT, reason="SELFMIS_PTBXL names no PTB-XL root")
def test_false_alarms_on_real_held_out_normals(tmp_path, probes, capsys):
    """The threshold from fold 9, the alarms from other folds, all through the detector."""
    records = selfmis.find_records(ROOT, sample_rate_hz=100)
    normal = records.labels[:, STATEMENTS.index("NORM")] > 0
    infarct = records.labels[:, NINE].any(1)
    there = [os.path.exists(f"{records.name(i)}.hea") for i in range(len(records.folds))]
    detector = load_detector(probes["one"])

    def scores(rows):
        ecg = [records.read(i, ("I",), 100) for i in rows]
        return 1 - np.prod([1 - p for p in detector(np.stack(ecg), 100).values()], axis=0)

    nine = np.flatnonzero(np.array(there) & (records.folds == 9))[:300]
    others = np.flatnonzero(np.array(there) & (records.folds != 9) & normal & ~infarct)[:300]
    kinds = infarct[nine], (normal & ~infarct)[nine]
    if min(kinds[1].sum(), kinds[0].sum(), len(others)) < 20:
        pytest.skip("too few records")
    probe = changed(
        probes["one"], tmp_path / "p.pt", validation=validation_fold(scores(nine), *kinds)
    )
    point = operating_point(torch.load(probe, weights_only=True))
    alarms = (scores(others) >= point["threshold"]).mean()
    deviation = math.sqrt(0.1 * 0.9 * (1 / len(others) + 1 / kinds[1].sum()))
    assert alarms <= 0.1 + 1 / kinds[1].sum() + 3 * deviation
    files = [records.name(i) for i in others[:20]]
    found = [entry["any_infarct"] for entry in answers(capsys, probe, *files).values()]
    np.testing.assert_allclose([one["score"] for one in found], scores(others[:20]), atol=1e-4)
    assert [one["positive"] for one in found] == [
        s >= point["threshold"] for s in scores(others[:20])
    ]


def test_the_answer_ranks_the_types_and_says_how_usual_they_are():
    content = {"classes": list(STATEMENTS)} | of(usual_fold())
    content["positives"] = torch.zeros(44, dtype=int)
    for name, n in (("IMI", 90), ("ASMI", 36), ("PMI", 2)):
        content["positives"][STATEMENTS.index(name)] = n
    p = dict.fromkeys(MI_TYPES, 0.01) | {"ASMI": 0.3, "IMI": 0.5, "PMI": 0.1}
    point = operating_point(content)
    answer = make_answer(p, content, point)
    assert list(answer["types"])[:3] == ["IMI", "ASMI", "PMI"]
    assert answer["types"]["IMI"] == pytest.approx(
        {"probability": 0.5, "times_its_share": 0.5 / (90 / 360), "validation_positives": 90}
    )
    assert answer["types"]["ASMI"]["times_its_share"] == pytest.approx(3)
    assert answer["types"]["AMI"]["times_its_share"] is None
    verdict = answer["any_infarct"]
    assert verdict["score"] == pytest.approx(1 - 0.5 * 0.7 * 0.9 * 0.99**6)
    assert verdict["positive"] is (verdict["score"] >= point["threshold"])
    right = point["sensitivity"] * 0.03
    wrong = point["false_alarms_normal"] * 0.97
    assert verdict["predictive_value"] == pytest.approx(right / (right + wrong))
    lines = [extras.detect.type_words(entry) for entry in answer["types"].values()]
    assert lines[0].split() == ["0.5000", "2.0", "x", "its", "share"]
    assert "18.0 x its share  (cases there: only 2)" in lines[2]
    assert "its share" not in lines[3] and "(cases there: only 0)" in lines[3]


# --- the command ---


def test_positive_at_or_above_the_threshold(tmp_path, probes, record, capsys):
    """Scores of the fold just around that of the recording; another specificity, another answer."""
    score = answers(capsys, probes["one"], record)[str(record)]["any_infarct"]["score"]
    normal = np.linspace(score - 0.105, score + 0.095, 201)  # 95 of them are higher
    fold = validation_fold(np.r_[np.ones(20), normal], np.arange(221) < 20, np.arange(221) >= 20)
    path = changed(probes["one"], tmp_path / "p.pt", validation=fold)
    for specificity, positive in ((0.5, True), (0.52, True), (0.53, False), (0.9, False)):
        flags = ["--specificity", specificity, "--prevalence", 0.5]
        entry = answers(capsys, path, record, *flags)[str(record)]["any_infarct"]
        assert entry["positive"] is positive is (score >= entry["threshold"])
        assert (entry["specificity"], entry["prevalence"]) == (specificity, 0.5)
        assert entry["false_alarms_normal"] == pytest.approx(1 - specificity, abs=0.006)
        out = detect(capsys, path, record, *flags)[1]
        assert ("any infarct: POSITIVE" in out, "any infarct: negative" in out) == (
            positive,
            not positive,
        )
        assert f"positive from {entry['threshold']:.3f}" in out
        assert f"{entry['false_alarms_normal']:.0%} of its 201 normal records" in out
    for flag in ("--specificity", "--prevalence"):
        for value in ("90", "1", "0", "-0.1", "nan", "high"):
            code, _, errors = detect(capsys, path, record, flag, value)
            assert code == 2 and f"argument {flag}" in errors[-1]


def test_what_is_printed_is_what_stands_in_json(probes, record, capsys):
    entry = answers(capsys, probes["one"], record)[str(record)]
    out = detect(capsys, probes["one"], record)[1]
    assert (entry["seconds"], entry["sample_rate_hz"], entry["leads"]) == (20, 500, ["I"])
    verdict = entry["any_infarct"]
    rate = entry["beats_a_minute"]
    assert 40 < rate < 130 and f"20.0 s at 500 Hz, lead I, {rate:.0f} beats a minute" in out
    assert f"(score {verdict['score']:.3f}, " in out
    assert f"finds {verdict['sensitivity']:.0%} of the validation fold's 100 infarcts" in out
    assert f"{verdict['false_alarms_other']:.0%} of its 60 other abnormal records" in out
    assert "where 3.0% have an infarct and all others a normal ECG" in out
    assert f"{verdict['predictive_value']:.0%} of positive answers are right" in out
    ranked = sorted(MI_TYPES, key=lambda t: -entry["types"][t]["probability"])
    assert list(entry["types"]) == ranked
    lines = [line for line in out.splitlines() if line.split()[:1] and line.split()[0] in ranked]
    assert [line.split()[0] for line in lines] == ranked
    for line, t in zip(lines, ranked, strict=True):
        assert f"{entry['types'][t]['probability']:.4f}" in line
        assert f"{entry['types'][t]['times_its_share']:.1f} x its share" in line
        assert ("only 2" in line) == (t == "PMI")
    assert "POSITIVE" not in "".join(lines) and "negative" not in "".join(lines)
    assert "not a medical device" in out


@pytest.mark.parametrize("infarcts, normals", [(9, 50), (50, 9), (0, 0)])
def test_no_verdict_without_ten_infarcts_and_ten_normal_records(
    tmp_path, probes, record, capsys, infarcts, normals
):
    kind = np.repeat([0, 1, 2], [infarcts, normals, 50])
    fold = validation_fold(np.linspace(0, 1, len(kind)), kind == 0, kind == 1)
    path = changed(probes["one"], tmp_path / "p.pt", validation=fold)
    verdict = answers(capsys, path, record)[str(record)]["any_infarct"]
    assert verdict["positive"] is None and verdict["threshold"] is None
    sentence = f"the validation fold has {infarcts} infarcts and {normals} normal records"
    assert verdict["no_verdict"].startswith(sentence)
    out = detect(capsys, path, record)[1]
    assert "NO VERDICT" in out and sentence in out
    assert "negative" not in out and "POSITIVE" not in out


def test_what_the_probe_is_stands_before_the_answer(tmp_path, probes, record, capsys):
    synthetic = PTBXL_DATA | {"data": "synthetic:0", "records": 2_000}
    nothing = results_of() | {"any": {"NORM": {"auc": None}}}
    cases = (
        ({}, [], "ptb-xl, 17,000 records without labels, folds 1 2; ptb-xl, 17,000 records with"),
        ({"warnings": ["fold 10 chose the encoder: the test is not clean"]}, ["not clean"], ""),
        ({"training_data": [], "head_training_data": [synthetic]}, ["synthetic ECG alone"], ""),
        ({"training_data": [synthetic]}, [], "synthetic:0, 2,000 records with labels, folds 1 2"),
        ({"results": nothing}, [], "test AUC: mean of nine types 0.790, mean of six types 0.810"),
    )
    for changes, warnings, words in cases:
        path = changed(probes["one"], tmp_path / "p.pt", **changes)
        out = detect(capsys, path, record)[1]
        probe = strict_json(detect(capsys, path, record, "--json")[1])["probe"]
        first, *others = out[: out.index(str(record))].strip().splitlines()
        assert first.startswith(f"p.pt trained on: {probe['trained_on']}; test AUC: ")
        assert words in first
        assert len(probe["warnings"]) == len(warnings) == len(others)
        for text, line, word in zip(probe["warnings"], others, warnings, strict=True):
            assert word in text and line == f"warning: {text}"
    line = detect(capsys, probes["one"], record)[1].splitlines()[0]
    assert "any infarct against normal 0.853, mean of nine types 0.790" in line
    assert "folds 9" not in line  # what only chose is no training


def test_flags_of_a_text_file_reach_the_reader(tmp_path, probes, source, capsys):
    path = tmp_path / "x.csv"
    rows = "".join(f"{a:.4f},{b:.4f}\n" for a, b in source[0, :2].T)
    path.write_text("noise,CH1\n" + rows)
    flags = ["--column", "CH1", "--sample-rate", 500, "--unit", "mV"]
    entry = answers(capsys, probes["one"], path, *flags)[str(path)]
    want = list(load_detector(probes["one"])(source[0, 1], 500).values())
    np.testing.assert_allclose(probabilities(entry), want, atol=2e-3)
    code, _, errors = detect(capsys, probes["one"], path)
    assert code == 2 and "(1 noise, 2 CH1); give --column NAME or its number" in errors[0]


def test_warnings_are_printed_and_in_json(tmp_path, probes, source, capsys):
    np.save(tmp_path / "down.npy", -source[0, 0])
    np.save(tmp_path / "volts.npy", source[0, 0] / 1000)
    found = answers(capsys, probes["one"], tmp_path, "--sample-rate", "500")
    out = detect(capsys, probes["one"], tmp_path, "--sample-rate", "500")[1]
    for name, word in (("down", "points down"), ("volts", "--unit")):
        text, length = found[str(tmp_path / f"{name}.npy")]["warnings"]
        assert "20.0 s, and the rates were measured on 10 s: the answer is the mean of 2" in length
        assert word in text and f"warning: {text}\n" in out


def test_a_folder_and_several_files(tmp_path, probes, source, capsys):
    """Every recording of a folder and of what lies below it; an empty folder is said."""
    (tmp_path / "a/folder.csv").mkdir(parents=True)
    names = ("C.TXT", "b.csv", "d.tsv")
    x = source[0, 0, :2000]
    want = [write_text(tmp_path / f"a/{name}", ["500 Hz"], x) for name in names]
    write_record(tmp_path / "a/b/c", source[1], rate=500)
    (tmp_path / "a/notes.md").write_text("500 Hz")
    want.append(tmp_path / "a/b/c.hea")
    assert sorted(answers(capsys, probes["one"], tmp_path / "a")) == sorted(map(str, want))
    backwards = want[::-1]
    assert list(answers(capsys, probes["one"], *backwards)) == list(map(str, backwards))
    twice = answers(capsys, probes["one"], tmp_path / "a", *want)
    assert sorted(twice) == sorted(map(str, want))
    (tmp_path / "empty").mkdir()
    code, out, errors = detect(capsys, probes["one"], tmp_path / "empty", want[0])
    assert code == 2 and "IMI" in out
    assert errors == [f"error: {tmp_path}/empty: a folder without recordings"]


def test_a_record_of_several_segments_is_one_recording(tmp_path, probes, source, capsys):
    """The master in a folder; its segments only where they are asked for by name."""
    for k in range(2):
        write_record(tmp_path / f"r_{k}", source[0][:, 5000 * k : 5000 * (k + 1)], rate=500)
    (tmp_path / "r.hea").write_text("# two parts\nr/2 12 500 10000\nr_0 5000\nr_1 5000\n")
    found = answers(capsys, probes["one"], tmp_path)
    assert list(found) == [str(tmp_path / "r.hea")]
    want = list(load_detector(probes["one"])(source[0, :1], 500).values())
    np.testing.assert_allclose(probabilities(found[str(tmp_path / "r.hea")]), want, atol=2e-3)
    assert list(answers(capsys, probes["one"], tmp_path / "r_1")) == [str(tmp_path / "r_1")]
    names = sorted(tmp_path.iterdir())  # as a shell gives folder/*
    assert list(answers(capsys, probes["one"], *names)) == [str(tmp_path / "r.hea")]
    one = [tmp_path / name for name in ("r_1.dat", "r_1", "r_1.hea")]
    assert list(answers(capsys, probes["one"], *one)) == [str(one[0])]


def test_a_traceback_is_shown_when_asked_for_and_for_our_own_defects(
    tmp_path, probes, capsys, monkeypatch
):
    with pytest.raises(UsageError):
        detect(capsys, probes["one"], tmp_path / "nobody.csv", "--debug")

    def defect(*arguments):
        raise ValueError("a shape bug")

    np.save(tmp_path / "x.npy", made_up(1)[0][0, 0])
    monkeypatch.setattr(extras.detect, "check_recording", defect)
    with pytest.raises(ValueError, match="a shape bug"):
        detect(capsys, probes["one"], tmp_path / "x.npy", "--sample-rate", 100)


# --- odd files ---


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(array):
    file = io.BytesIO()
    np.savez(file, ecg=array)
    return file.getvalue()


def npy_header(text):
    return b"\x93NUMPY\x01\x00v\x00" + text.encode().ljust(117) + b"\n" + bytes(100)


def bad_texts(x):
    """{name: (content, what the sentence must say)}; x: 10 s of lead I at 500 Hz."""
    column = "\n".join(f"{v:.4f}" for v in x) + "\n"
    return {
        "empty.csv": ("", "number"),
        "blank.csv": (" \n" * 500, "number"),
        "commas.csv": (",,,\n" * 5000, "number"),
        "semicolons.csv": (";;\n" * 5000, "number"),
        "tabs.tsv": ("\t\t\n" * 5000, "number"),
        "header.csv": ("Name,Jane\nSample Rate,512 hertz\n\nLead,Lead I\n", "number"),
        "words.csv": ("hello\nworld\n" * 100, "number"),
        "page.csv": ("<html>\n<body>404</body>\n</html>\n", "number"),
        "list.txt": ('{"ecg": [0.1, 0.2]}', "number"),
        "nan.csv": ("I\n" + "nan\n" * 5000, "number"),
        "infinite.csv": ("inf\n-inf\n" * 2500, "number"),
        "one_sample.csv": ("I\n0.1\n", "flat"),
        "short.csv": (column[:7000], "too short"),
        "flat.csv": ("0.5\n" * 5000, "flat"),
        "huge.csv": (column + "1e300\n-1e300\n", "too large"),
        "large.csv": (column + "1e40\n", "too large"),
        "ragged.csv": ("0.1,0.2\n0.1,0.3\n0.3\n" * 2000, ""),
        "gap.csv": (column + "1 electrode off\n" + column, "line 5001"),
        "wide.csv": ((",".join("0" * 100) + "\n") * 5000, "line 1 holds 100 numbers"),
        "base64.txt": ("QUJD" * 50_000, "200,000 characters"),
        "late.csv": (column + "\0" + column, "binary"),
        "lead_two.csv": ("II\n" + column, "lead I"),
        "two_columns.csv": ("a,b\n" + "0.1,0.5\n-0.3,0.2\n" * 2500, "lead I"),
        "pressure.csv": ("Unit,mmHg\n" + column, "mmHg"),
        "bytes.csv": (bytes(range(256)) * 40, "binary"),
        "zeros.txt": (bytes(5000), "binary"),
        "zipped.csv": (gzip.compress(column.encode()), ""),
        "picture.csv": (b"\x89PNG\r\n\x1a\n" + bytes(500), "binary"),
        "paper.csv": (b"%PDF-1.4\n%\xe2\xe3\n1 0 obj\n<<>>\n", "number"),
        "hex.csv": ("0x1f\n0x2f\n" * 2500, "number"),
        "minus.csv": ("-\n" * 5000, "number"),
    }


def bad_arrays(x):
    vast = "{'descr': '<f8', 'fortran_order': False, 'shape': (%s,), }"
    fields = np.zeros(5000, [("a", float), ("b", float)])
    return {
        "empty.npy": (b"", ""),
        "words.npy": (b"hello", ""),
        "pickled.npy": (pickle.dumps([0.1] * 5000), ""),
        "objects.npy": (npy(np.array([{}, None], dtype=object)), ""),
        "strings.npy": (npy(np.array(["a", "b"])), ""),
        "fields.npy": (npy(fields), ""),
        "complex.npy": (npy(x + 1j), "complex"),
        "cube.npy": (npy(np.zeros((2, 12, 5000))), "(2, 12, 5000)"),
        "scalar.npy": (npy(np.float64(1)), ""),
        "none.npy": (npy(np.zeros((12, 0))), ""),
        "eleven.npy": (npy(np.zeros((11, 5000))), "(11, 5000)"),
        "nan.npy": (npy(np.full(5000, np.nan)), "number"),
        "infinite.npy": (npy(np.full(5000, np.inf)), "number"),
        "short.npy": (npy(x[:1000]), "too short"),
        "cut.npy": (npy(x)[:5000], ""),
        "archive.npy": (npz(x), ""),
        "cut_archive.npy": (npz(x)[:500], ""),
        "vast.npy": (npy_header(vast % 10**12), ""),
        "vaster.npy": (npy_header(vast % 10**30), ""),
        "header.npy": (npy_header("{'descr': '<f8', 'fortran_order'"), ""),
    }


def bad_records(folder, x):
    """{path of a broken WFDB record: what the sentence must say}."""

    def header(name, old="", new=""):
        write_record(folder / name, x, rate=500)
        text = (folder / f"{name}.hea").read_text()
        assert old in text
        (folder / f"{name}.hea").write_text(text.replace(old, new))
        return folder / name

    cut, gone, nothing, nameless = map(header, ("cut", "gone", "nothing", "nameless"))
    os.truncate(f"{cut}.dat", 1000)
    os.remove(f"{gone}.dat")
    (folder / "nothing.hea").write_text("")
    write_record(folder / "others", x[1:3], ("II", "III"), rate=500)
    lines = (folder / "nameless.hea").read_text().splitlines()
    bare = "\n".join(" ".join(line.split()[:3]) for line in lines)
    (folder / "nameless.hea").write_text(bare + "\n")
    return {
        cut: "",
        gone: "",
        nothing: "",
        nameless: "",
        folder / "nobody": "no such",
        folder / "nobody.csv": "",
        folder / "nobody.npy": "",
        folder / "others": "lead I",
        header("pressure", "/mV", "/mmHg"): "mmHg",
        header("format", ".dat 16", ".dat 999"): "",
        header("segments", "segments 12", "segments/2 12"): "",
    }


def test_more_than_fifty_malformed_files_beside_three_good_ones_in_one_call(tmp_path, probes):
    """One sentence each that names the file, exit code 2, no traceback or warning of a library."""
    x = made_up(3, rate=500, seed=3)[0]
    bad = {}
    for name, (content, words) in (bad_texts(x[0, 0]) | bad_arrays(x[0, 0])).items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        bad[tmp_path / name] = words
    bad |= bad_records(tmp_path, x[0])
    assert len(bad) >= 50
    good = [tmp_path / "good.csv", tmp_path / "good.npy", tmp_path / "good"]
    write_text(good[0], ["I"], x[0, 0])
    np.save(good[1], x[1, 0])
    write_record(good[2], x[2], rate=500)
    files = [good[0], *list(bad)[:30], good[1], *list(bad)[30:], good[2]]
    flags = ["--probe", probes["one"], "--sample-rate", 500, "--json"]
    done = run_module("extras.detect", *files, *flags)
    errors = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for line, (path, words) in zip(errors, bad.items(), strict=True):
        assert line.startswith("error: ") and len(line) < 400
        assert str(path) in line and words in line, line
        assert len(line) > len(f"error: {path}: ") + 10, line
    found = json.loads(done.stdout)["recordings"]
    assert [entry["file"] for entry in found] == [str(path) for path in files]
    answered = [entry for entry in found if "types" in entry]
    assert [entry["file"] for entry in answered] == [str(path) for path in good]
    assert all(("error" in entry) != ("types" in entry) for entry in found)
    detector = load_detector(probes["one"])
    for entry, ecg in zip(answered, x, strict=True):
        want = list(detector(ecg[0], 500).values())
        np.testing.assert_allclose(probabilities(entry), want, atol=2e-3)


# --- the page ---


@pytest.fixture
def pages(monkeypatch):
    """The (figure, axes) of every page that is drawn."""
    drawn, paper = [], extras.detect.ecg_paper

    def keep(*arguments):
        drawn.append(paper(*arguments))
        return drawn[-1]

    monkeypatch.setattr(extras.detect, "ecg_paper", keep)
    return drawn


def test_the_page_shows_the_strip_in_scale_the_verdict_and_the_types(
    tmp_path, probes, record, source, capsys, pages
):
    """25 mm a second, 10 mm a millivolt; a bar for each type, all of one colour."""
    out = tmp_path / "r.png"
    code, text, errors = detect(capsys, probes["one"], record, "--picture", out)
    assert (code, errors) == (0, []) and f"picture: {out}\n" in text
    entry = answers(capsys, probes["one"], record, "--picture", out)[str(record)]
    assert entry["picture"] == str(out)
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and out.stat().st_size > 20_000
    figure, axes = pages[0]
    assert len(axes.lines) == 2  # of 20 s
    for row, line in enumerate(axes.lines):
        mm, part = line.get_xydata().T, source[0, 0, 5000 * row : 5000 * row + 5000]
        np.testing.assert_allclose(np.diff(mm[0]), 25 / 500)
        np.testing.assert_allclose(mm[1] - mm[1].mean(), 10 * (part - part.mean()), atol=0.02)
    (bars,) = [axes for axes in figure.axes if axes.patches]
    widths = [bar.get_width() for bar in bars.patches]
    ranked = [kind["probability"] for kind in entry["types"].values()]
    np.testing.assert_allclose(widths, ranked, rtol=1e-6)
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert labels == list(entry["types"])
    words = [text.get_text() for text in bars.texts]
    assert words[1:] == [extras.detect.type_words(kind) for kind in entry["types"].values()]
    assert max(widths) <= bars.get_xlim()[1] and bars.get_xlim()[1] >= 0.5
    inside = figure.get_window_extent()
    for shown in [*bars.texts, *figure.texts, *axes.texts]:
        assert shown.get_window_extent().x1 < inside.x1
    assert len({bar.get_facecolor() for bar in bars.patches}) == 1
    assert not bars.lines and bars.get_legend() is None  # nothing that reads as a threshold
    (verdict,) = figure.texts
    lines = verdict.get_text().splitlines()
    words = extras.detect.verdict_lines(entry["any_infarct"])
    # What trained the detector stands on the page that is shown around.
    (length,) = entry["warnings"]
    assert " ".join(lines) == " ".join([*words, text.splitlines()[0], f"warning: {length}"])
    assert "false alarms: " in verdict.get_text()


def test_no_verdict_looks_neither_positive_nor_negative(tmp_path, probes, record, capsys, pages):
    high = validation_fold(np.linspace(2, 3, 40), np.arange(40) < 20, np.arange(40) >= 20)
    low = validation_fold(np.linspace(-3, -2, 40), np.arange(40) < 20, np.arange(40) >= 20)
    few = validation_fold(np.linspace(0, 1, 12), np.arange(12) < 6, np.arange(12) >= 6)
    looks = set()
    for word, fold in (("POSITIVE", low), ("negative", high), ("NO VERDICT", few)):
        path = changed(probes["one"], tmp_path / "p.pt", validation=fold)
        answers(capsys, path, record, "--picture", tmp_path / "p.png")
        (verdict,) = pages[-1][0].texts
        assert word in verdict.get_text()
        box = verdict.get_bbox_patch()
        red, green, blue, _ = box.get_facecolor()
        assert min(red, green, blue) > 0.7  # no red lamp and no green one
        looks.add((box.get_facecolor(), box.get_linestyle()))
    assert len(looks) == 3


def test_the_shipped_detector_fits_on_its_page_and_says_that_four_seconds_were_not_measured(
    tmp_path, capsys, pages
):
    np.save(tmp_path / "x.npy", made_up(1, seconds=4)[0][0, 0])
    flags = [tmp_path / "x.npy", "--sample-rate", 100, "--picture", tmp_path / "p.png"]
    code, out, errors = call(extras.detect.main, capsys, *flags)
    assert (code, errors) == (0, []) and "warning: 4.0 s, and the rates" in out
    ((figure, _),) = pages
    (verdict,) = figure.texts
    assert verdict.get_window_extent().x1 < figure.get_window_extent().x1
    assert "on a hand-held device were positive" in " ".join(verdict.get_text().split())


def test_what_is_known_of_the_data_is_said_once():
    """Of ECGFounder's own neither folds nor the number of records are known."""
    known = {"data": "mimic", "use": "validation", "folds": [], "labels": False, "records": 5000}
    unknown = {"data": "ECGFounder's own", "labels": True}
    words = extras.detect.describe_data([unknown, known, unknown])
    assert words == "ECGFounder's own with labels; chosen by mimic, 5,000 records without labels"


def test_pages_of_short_and_long_recordings_and_places_that_cannot_be(
    tmp_path, probes, capsys, monkeypatch
):
    path, out = tmp_path / "$a$_b.npy", tmp_path / "p.png"
    for seconds in (2.6, 45):
        np.save(path, made_up(1, seconds=seconds)[0][0, 0])
        answers(capsys, probes["one"], path, "--sample-rate", 100, "--picture", out)
        assert out.stat().st_size > 10_000
    other = tmp_path / "b.npy"
    np.save(other, made_up(1)[0][0, 0])
    code, _, errors = detect(capsys, probes["one"], path, other, "--picture", out)
    assert code == 2 and errors == ["error: --picture: draws one recording, 2 were given"]
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    for name in ("nowhere/p.png", "folder.png", "p", "p.xyz", "b.npy/p.png"):
        flags = ["--sample-rate", 100, "--picture", tmp_path / name]
        code, _, errors = detect(capsys, probes["one"], path, *flags)
        assert code == 2 and len(errors) == 1 and str(tmp_path / name) in errors[0]
    assert sorted(tmp_path.iterdir()) == before
    for device in ("/dev/null", "/dev/stdout"):
        flags = ["--sample-rate", 100, "--picture", device]
        code, _, errors = detect(capsys, probes["one"], path, *flags)
        assert code == 2 and len(errors) == 1 and device in errors[0]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    flags = ["--sample-rate", 100, "--picture", out]
    code, _, errors = detect(capsys, probes["one"], path, *flags)
    assert code == 2 and len(errors) == 1 and "pip install matplotlib" in errors[0]


# --- end to end: a probe.pt that train_probe.py wrote ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory, ptbxl, tiny):
    """{leads: folder of a finished probe}."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_probe, "draw_roc", lambda *arguments: None)  # the slowest part
        for leads in (1, 12):
            flags = {"epochs": 3, "workers": 0, "head": "adam", "out": str(out / str(leads))}
            train_probe.main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[leads], **flags))
    return {leads: out / str(leads) for leads in (1, 12)}


@pytest.mark.parametrize("leads", [1, 12])
def test_the_verdict_of_a_trained_probe_is_that_of_its_validation_fold(trained, ptbxl, leads):
    """Temperature, scores, kinds and positives of fold 9, again from its records."""
    content = torch.load(trained[leads] / "probe.pt", weights_only=True)
    detector = load_detector(trained[leads] / "probe.pt")
    assert content["classes"] == list(STATEMENTS)
    records = selfmis.find_records(str(ptbxl), sample_rate_hz=100)
    val = np.flatnonzero(records.folds == 9)
    labels = records.labels[val]
    assert content["positives"].tolist() == labels.sum(0).tolist()
    p = [detector(records.read(i, detector.leads, 100), 100) for i in val]
    scores = [1 - math.prod(1 - q for q in one.values()) for one in p]
    fold, infarct = content["validation"], labels[:, NINE].any(1)
    assert fold["infarct"].tolist() == infarct.tolist()
    normal = (labels[:, STATEMENTS.index("NORM")] > 0) & ~infarct
    assert fold["normal"].tolist() == normal.tolist()
    np.testing.assert_allclose(fold["any_infarct"].numpy(), scores, atol=1e-4)


def test_a_detector_gives_what_the_probe_predicted(trained, capsys):
    """Columns, temperature and preprocessing: the test records against predictions.npz."""
    for leads in (1, 12):
        saved = np.load(trained[leads] / "predictions.npz")
        temperature = torch.load(trained[leads] / "probe.pt", weights_only=True)["temperature"]
        found = answers(capsys, trained[leads] / "probe.pt", *saved["record"])
        want = 1 / (1 + np.exp(-saved["logits"][:, NINE] / temperature))
        got = [probabilities(entry) for entry in found.values()]
        np.testing.assert_allclose(got, want, atol=1e-3)
    assert np.ptp(want, 0).max() > 0.01


def test_every_verdict_says_on_which_recorders_its_rates_hold(probes):
    content = torch.load(probes["one"], weights_only=True)

    def last_line(content, **flags):
        point = operating_point(content, **flags)
        verdict = make_answer(dict.fromkeys(MI_TYPES, 0.1), content, point)["any_infarct"]
        return verdict_lines(verdict)[-1]

    here = "measured on recorders like the validation fold's"
    where = "not on a hand-held device, where false alarms are several times as frequent"
    assert last_line(content) == f"{here}, {where}"
    assert last_line(content | {"lead": "all"}) == here
    content["handheld"] = {"recordings": 5000, "positive": 0.4}
    found = operating_point(content)["sensitivity"]
    value = found * 0.2 / (found * 0.2 + 0.4 * 0.8)
    counted = "at 90% specificity 40% of 5,000 normal rhythms on a hand-held device were positive"
    right = f"so that there {value:.0%} of positive answers would be right"
    assert last_line(content, prevalence=0.2) == f"{here}; {counted}, {right}"
    assert last_line(content, specificity=0.8) == f"{here}; {counted}"
