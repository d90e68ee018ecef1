"""What extras/realism.py measures, against signals whose answer is known, and the command."""

import csv

import numpy as np
import pytest
from conftest import PTBXL_NAMES, write_record
from scipy.optimize import brentq

from extras import realism
from extras.realism import BEFORE, INTERVALS, WAVES, Measurements, Pair, ks_distances, measure
from extras.synthetic import gaussian, synthesize
from selfmis import LEADS, STATEMENTS, Records, UsageError, find_records

# In units of a lead's R; aVR sees everything upside down.
LEAD_GAIN = np.array([1, 1.2, 0.2, -1.1, 0.4, 0.7, 0.5, 0.6, 0.8, 1.4, 1.3, 1.1])[:, None]
RR_MS = (800, 900) * 6
P, QRS, T = (-170, 18), (0, 12), (260, 35)  # ms after R, width in ms


def steep_until() -> float:
    """How many widths from its centre a Gaussian's slope has fallen to 0.08 of the steepest."""
    return brentq(lambda u: u * np.exp(0.5 - u * u / 2) - 0.08, 1, 6)


def constructed(p=0.15, t=0.3, rate_hz=100):
    """(12, T) mV: beats with an R of 1 mV in lead I, and the places of R in ms."""
    ms = np.arange(10 * rate_hz) * 1000 / rate_hz
    at = 350 + np.concatenate([[0], np.cumsum(RR_MS)])
    at = at[at < 9500]
    lead_I = np.zeros(len(ms))
    for r in at:
        for height, (centre, width) in ((p, P), (1, QRS), (t, T)):
            lead_I += height * gaussian(ms - r, centre, width)
    return LEAD_GAIN * lead_I, at


def test_intervals_and_amplitudes_of_a_constructed_record():
    ecg, at = constructed()
    found = measure([ecg + LEAD_GAIN])  # electrodes have offsets
    half = QRS[1] * steep_until()
    rr = np.diff(at)
    expected = {
        "RR": rr.mean(),
        "SD of RR": rr.std(),
        "PR": -P[0] + 2 * P[1] - half,  # a Gaussian's steepest tangent ends two widths away
        "QRS": 2 * half,
        "QTc": (T[0] + 2 * T[1] + half) / (rr.mean() / 1000) ** (1 / 3),
    }
    for name, value in zip(INTERVALS, found.intervals[0], strict=True):
        assert abs(value - expected[name]) < 5, (name, value, expected[name])
    r, s, _, t, _ = found.amplitudes[0].T
    upright = LEAD_GAIN[:, 0] > 0
    assert np.allclose(np.where(upright, r, s), np.abs(LEAD_GAIN[:, 0]), rtol=0.03)
    assert np.allclose(t, 0.3 * LEAD_GAIN[:, 0], rtol=0.02)
    shown = LEADS.index(realism.SHOWN[2])
    assert np.isclose(found.beats[0, 2, BEFORE], r[shown], atol=1e-6)


def test_qrs_does_not_grow_with_noise():
    ecg, _ = constructed()
    noise = np.random.default_rng(0).normal(0, 0.02, ecg.shape)
    clean, noisy = measure([ecg, ecg + noise]).intervals[:, INTERVALS.index("QRS")]
    assert abs(noisy - clean) < 10


def test_each_wave_of_a_beat():
    ms = (np.arange(400) - BEFORE) * 2.0
    beat = gaussian(ms, 0, 6) - 0.2 * gaussian(ms, -30, 5) - 0.4 * gaussian(ms, 30, 5)
    beat += np.where((ms > 80) & (ms < 130), 0.002 * (ms - 80), 0) - 0.25 * gaussian(ms, 260, 20)
    found = dict(zip(WAVES, realism.wave_amplitudes(np.stack([beat, 2 * beat]))[1], strict=True))
    expected = {"R": 2, "S": 0.8, "Q": 0.4, "T": -0.5, "ST60": 0.1}
    assert found == pytest.approx(expected, abs=0.005)


def test_waves_that_are_not_there_have_no_limits():
    pr, qtc = measure([constructed(p=0, t=0.001)[0]]).intervals[0, [2, 4]]
    assert np.isnan(pr) and np.isnan(qtc)


def test_every_beat_is_found_and_a_tall_t_is_none():
    x, _, drawn = synthesize(20, seed=3, details=True)
    recordings = list(zip(x, drawn["r_times"], strict=True))
    tall, at = constructed(t=0.7, rate_hz=500)
    for ecg, r_times in [*recordings, (tall, at / 1000)]:
        found = realism.find_r(ecg) / 500
        apart = np.abs(np.asarray(r_times)[:, None] - found)  # (true, found)
        assert apart.min(1)[(r_times > 0.3) & (r_times < 9.7)].max() < 0.06
        assert apart.min(0)[(found > 0.3) & (found < 9.7)].max() < 0.06


def test_a_record_without_beats_is_left_out():
    ecg, _ = constructed()
    with_gap = ecg.copy()
    with_gap[0, 700:710] = np.nan
    assert len(measure([np.zeros((12, 1000)), ecg, with_gap]).intervals) == 2


def test_ks_distances_leave_nan_out():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 2, 3))
    made = real + np.array([[0, 0, 100], [0, -100, 0]])
    made[0] = np.nan
    real[0] = np.nan
    assert ks_distances(real, made).tolist() == [[0, 0, 1], [0, 1, 0]]
    assert ks_distances(np.arange(4.0)[:, None], np.arange(2.0, 6)[:, None]) == [0.5]


@pytest.fixture(scope="module")
def measured():
    """Of 30 synthetic records."""
    return measure(synthesize(30, seed=4, sample_rate_hz=100)[0])


def test_the_tables_show_equal_and_disjoint_samples(measured, capsys):
    amplitudes = measured.amplitudes - 100
    amplitudes[:, :5, 3] = measured.amplitudes[:, :5, 3]  # T differs in seven of twelve leads
    amplitudes[:, :7, 4] = measured.amplitudes[:, :7, 4]  # ST60 in five
    other = Measurements(measured.intervals + 5000, amplitudes, measured.beats, measured.power)
    realism.print_tables({"all": Pair(measured, measured), "NORM": Pair(measured, other)})
    parts = capsys.readouterr().out.split("\n## ")
    same, apart = cells(parts[1])
    assert same[:3] == ["all", "30", "30"] and apart[:2] == ["NORM", "30"]
    assert same[3] == apart[3] == "0.35"  # 1.358 sqrt(2 / 30)
    assert set(same[4:14]) == {"0.00"} and set(apart[4:13]) == {"1.00"}
    assert apart[13] == "0.00"
    assert apart[14] == "R in I, 1.00"
    same, apart = cells(parts[2])
    rr = np.median(measured.intervals[:, 0])
    assert same[2] == f"{rr:.0f} / {rr:.0f} (0.00)"
    assert apart[2] == f"{rr:.0f} / {rr + 5000:.0f} (1.00)"
    low, high = np.percentile(measured.intervals[:, 0], (5, 95))
    moved = f"{low + 5000:.0f} to {high + 5000:.0f}"
    assert cells(parts[3])[1][2] == f"{low:.0f} to {high:.0f} / {moved}"
    row = cells(parts[4])[LEADS.index("V2")]
    r = np.median(measured.amplitudes[:, LEADS.index("V2"), 0])
    assert row[0] == "V2" and row[2] == f"{r:.2f} / {r:.2f} (0.00)"
    assert "-0.00" not in "".join(parts)
    assert all(set(row[2:]) == {"+0.0"} for row in cells(parts[6]))


def cells(table: str) -> list[list[str]]:
    """The rows of a printed table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_spectrum_shows_the_band_that_differs():
    ecg, _ = constructed()
    tone = np.sin(2 * np.pi * 42 * np.arange(1000) / 100)
    sides = [measure([ecg + size * tone]) for size in (0.1, 0.2)]
    difference = realism.band_differences(Pair(*sides))  # (12, 6)
    assert np.allclose(difference[:, -1], 20 * np.log10(2), atol=0.1)
    assert np.allclose(difference[:, :4], 0, atol=0.1)


def test_a_record_counts_where_its_infarcts_are_on_one_side():
    kinds = ("NORM", "ALMI ASMI", "IMI ASMI", "IMI", "NORM IMI", "IMI LVH")
    labels = np.zeros((len(kinds), len(STATEMENTS)), np.uint8)
    for i, names in enumerate(kinds):
        labels[i, [STATEMENTS.index(name) for name in names.split()]] = 1
    none = np.zeros(len(kinds))
    records = Records((), none, none, none, none, labels)
    rows = {name: realism.find_class(records, name).tolist() for name in realism.CLASSES}
    assert rows["NORM"] == [0] and rows["ALMI"] == rows["ASMI"] == [1]
    assert rows["IMI"] == [3, 4, 5] and rows["LMI"] == rows["PMI"] == []


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """PTB-XL's layout: in fold 8 ten normal records, ten IMI, an AMI, and a PMI without beats.

    In fold 9 one whose file is missing.
    """
    root = tmp_path_factory.mktemp("ptb-xl")
    names = ["NORM", "IMI"] * 10 + ["AMI", "PMI", "NORM"]
    x, _ = synthesize(len(names), seed=9, types=names, sample_rate_hz=100)
    x[names.index("PMI")] = 0
    columns = "ecg_id patient_id scp_codes strat_fold filename_lr filename_hr".split()
    with open(root / "ptbxl_database.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for i, name in enumerate(names):
            path = f"records100/00000/{i:05}_lr"
            fold = 8 if i < 22 else 9
            if fold == 8:
                write_record(root / path, x[i], PTBXL_NAMES)
            table.writerow([i, i, str({name: 100.0}), fold, path, f"{i:05}_hr"])
    return root


def test_the_command_prints_its_tables_and_draws(folder, tmp_path, capsys):
    picture = tmp_path / "realism.png"
    realism.main([str(folder), "--picture", str(picture)])
    text = capsys.readouterr().out
    assert "fold 8; left out for want of three beats: 1 records" in text
    assert "in all only: AMI 1." in text
    summary, intervals, _, *amplitudes, spectrum = text.split("\n## ")[1:]
    rows = {row[0]: row for row in cells(summary)}
    assert {name: row[1:3] for name, row in rows.items()} == {
        "all": ["21", "84"],
        "NORM": ["10", "40"],
        "IMI": ["10", "40"],
    }
    assert [part.split()[2] for part in amplitudes] == list(rows)
    # Both sides come from one generator, so only chance is between them.
    chance = float(rows["all"][3])
    assert all(0 < float(ks) < 1.2 * chance for ks in rows["all"][4:14])
    assert len(cells(intervals)) == 3 and len(cells(spectrum)) == 12
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000


def test_synthetic_records_have_the_class_and_hearts_of_their_own(folder):
    records = find_records(str(folder), sample_rate_hz=100)
    q_in_iii, rr = {}, {}
    for name in ("NORM", "IMI", "LMI"):
        pair = realism.measure_class(records, np.arange(5), name)
        assert pair.synthetic.intervals.shape == (20, 5) and len(pair.real.intervals) == 5
        q_in_iii[name] = pair.synthetic.amplitudes[:, LEADS.index("III"), WAVES.index("Q")]
        rr[name] = pair.synthetic.intervals[:, 0]
    assert np.median(q_in_iii["IMI"]) > 2 * np.median(q_in_iii["NORM"])
    # The same numbers would give both infarcts the same rhythms.
    assert np.mean(np.abs(rr["IMI"] - rr["LMI"]) < 2) < 0.3


def test_few_records_are_drawn_from_the_folds(folder, capsys):
    realism.main([str(folder), "--records", "5", "--fold", "7", "8"])
    text = capsys.readouterr().out
    [all_line] = cells(text.split("\n## ")[1])  # no class has ten records
    assert "beats: 1 records" in text and all_line[:3] == ["all", "4", "16"]  # the PMI is drawn


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--fold", "9"], "invalid choice: 9"),
        (["--fold", "7"], "no record of NORM, ALMI, "),
        (["--records", "0"], "--records=0 is out of range"),
        (["--records", "3", "--picture", "beats.jpg"], "ends in .png"),
    ],
)
def test_mistakes_are_named(folder, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        realism.main([str(folder), *flags])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    if "--fold" not in flags:
        with pytest.raises(UsageError):
            realism.main([str(folder), *flags, "--debug"])
