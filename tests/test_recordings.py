"""A person's recording in every format: what is read, what is asked for, what is warned of.

With SELFMIS_PTBXL=/path/to/ptb-xl the checks are also measured on real records.
"""

import datetime
import os
import re
import struct

import numpy as np
import pytest
from conftest import MIMIC_ORDER, made_up, write_record
from probes import NINE, rows_of

import selfmis
from extras.recordings import beats_a_minute, beats_differ, check_recording, cut_beats, fill_gaps
from extras.recordings import read_recording, without_wander
from extras.synthetic import synthesize
from selfmis import LEADS, STATEMENTS, UsageError

# fmt: off
APPLE = ["Name,Jane Doe", "Date of Birth,1 Jan 1970", "Recorded Date,2024-03-01 10:10:10 +0100",
         "Classification,Sinus Rhythm", "Symptoms,", "Software Version,2.0", 'Device,"Watch6,1"',
         "Sample Rate,512 hertz", "", "", "Lead,Lead I", "Unit,µV", ""]
APPLE_DE = ["Name,Jane Doe", "Geburtsdatum,01.01.1970", "Klassifizierung,Sinusrhythmus",
            "Symptome,", "Softwareversion,2.0", 'Gerät,"Watch6,1"',
            "Abtastrate,512 Hertz", "", "", "Ableitung,Ableitung I", "Einheit,µV", ""]
# fmt: on


@pytest.fixture(scope="module")
def source():
    """Two patients, 20 s at 500 Hz in mV."""
    return made_up(2, rate=500, seconds=20, seed=3)[0].astype(float)


@pytest.fixture(scope="module")
def lead_one(source):
    """6 s of lead I at 500 Hz in mV."""
    return source[0, 0, :3000]


def write_text(
    path, header, columns, separator=",", form="{:.4f}", comma=False, encoding="utf-8", end="\n"
):
    rows = zip(*columns, strict=True)
    lines = [separator.join(form.format(value) for value in row) for row in rows]
    if comma:
        lines = [line.replace(".", ",") for line in lines]
    path.write_bytes(end.join([*header, *lines, ""]).encode(encoding))
    return path


def refusal(path, leads=("I",), **flags):
    """The sentence with which a recording is refused; it names the file."""
    with pytest.raises(UsageError) as error:
        read_recording(path, leads, **flags)
    sentence = str(error.value)
    assert str(path).removesuffix(".hea") in sentence and "\n" not in sentence
    return sentence.replace(str(path), "FILE")


# --- one recording, every format ---


@pytest.fixture(scope="module")
def formats(tmp_path_factory, source):
    """Files of the first patient that need no flag: (with lead I, with all twelve leads)."""
    folder, x = tmp_path_factory.mktemp("formats"), source[0]
    seconds, uv = np.arange(x.shape[1]) / 500, np.rint(1e3 * x).astype(int)
    watch = 1e3 * selfmis.resample(x[:1], 500, 512)
    write_record(folder / "wfdb", x, rate=500)
    order = rows_of(MIMIC_ORDER)
    write_record(folder / "microvolt", x[order], MIMIC_ORDER, rate=500, unit="uV", adu=1)
    names = {
        "tab": ["recorder X", "sampling rate: 500 Hz", "ECG I [uV]\tECG II [uV]"],
        "volt": ['"time_ms","lead II (V)","lead I (V)"'],
        "physionet": ["'Elapsed time','i','ii'", "'seconds','mV','mV'"],
        "twelve": ["unit: mV", ",".join(["time", *reversed(LEADS)])],
        "plain": ["500 Hz", ",".join(LEADS)],
        "uv": ["Rate\t500 Hz", "\t".join(["sample", *(f"{lead}_uV" for lead in LEADS)])],
    }
    volts = [1000 * seconds, x[1] / 1e3, x[0] / 1e3]
    backwards = [seconds, *x[rows_of(reversed(LEADS))]]
    german = {"comma": True, "encoding": "latin-1", "end": "\r\n", "form": "{:.1f}"}
    one = [
        write_text(folder / "watch.csv", APPLE, watch, form="{:.3f}"),
        write_text(folder / "watch_de.csv", APPLE_DE, watch, form="{:.3f}", comma=True),
        write_text(folder / "watch_latin1.csv", APPLE_DE, watch, **german),
        write_text(
            folder / "semi.csv", ["Zeit (s);II (mV);I (mV)"], [seconds, *x[[1, 0]]], ";", comma=True
        ),
        write_text(folder / "tab.tsv", names["tab"], uv[:2], "\t", "{}"),
        write_text(folder / "blanks.txt", ["# time I"], [seconds, x[0]], "   "),
        write_text(folder / "blanks_de.txt", ["Zeit I"], [seconds, x[0]], " ", comma=True),
        write_text(
            folder / "volt.csv", names["volt"], volts, form='"{:.7f}"', encoding="utf-8-sig"
        ),
        write_text(folder / "physionet.csv", names["physionet"], [seconds, *x[:2]]),
        write_text(folder / "UPPER.CSV", ["500 Hz", "I"], x[:1]),
    ]
    twelve = [
        folder / "wfdb",
        folder / "microvolt.hea",
        write_text(folder / "twelve.csv", names["twelve"], backwards),
        write_text(folder / "plain.csv", names["plain"], uv * 1e-3, form="{:.3f}"),
        write_text(folder / "uv.tsv", names["uv"], [range(x.shape[1]), *uv], "\t", "{}"),
    ]
    return one, twelve


def test_every_format_is_read_in_millivolts_at_its_own_rate(formats, source):
    """z-scores would hide a wrong unit."""
    one, twelve = formats
    watch = selfmis.resample(source[0], 500, 512)
    for paths, leads in ((one + twelve, ("I",)), (twelve, LEADS)):
        for path in paths:
            ecg, rate, warnings = read_recording(path, leads)
            want, hertz = (watch, 512) if "watch" in path.name else (source[0], 500)
            assert rate == pytest.approx(hertz, rel=1e-6) and warnings == [], path
            found = ecg[:, : want.shape[1]]
            np.testing.assert_allclose(found, want[rows_of(leads)], atol=1e-3, err_msg=str(path))


def test_another_column_by_name_and_by_number(formats, source):
    (path,) = [path for path in formats[0] if path.name == "tab.tsv"]
    for column in ("ECG II [uV]", "ECG II", "2"):
        ecg, rate, warnings = read_recording(path, ("I",), column=column)
        sentence = "column ECG II is taken for lead I, which trained the detector"
        assert warnings == [sentence] * (column == "ECG II")
        np.testing.assert_allclose(ecg[0], source[0, 1], atol=1e-3)
        assert rate == 500
    for column in ("3", "0", "ECG", "-1"):
        sentence = refusal(path, column=column)
        assert "(1 ECG I [uV], 2 ECG II [uV]); give --column" in sentence and "line 3" in sentence
    with pytest.raises(UsageError, match="--column 2: this probe reads 12 leads"):
        read_recording(path, LEADS, column="2")
    two = path.with_name("two_lines.tsv")
    text = path.read_text().replace("recorder X", "Device\tX1")
    two.write_text(text.replace("ECG II [uV]", "other"))
    ecg = read_recording(two, ("I",), column="other", unit="uV", sample_rate_hz=500)[0]
    np.testing.assert_allclose(ecg[0], source[0, 1], atol=1e-3)


def test_arrays_of_every_shape_and_unit(tmp_path, source):
    x, path = source[0], tmp_path / "x.npy"
    lead_one = [x[0], x[:1], x[:1].T, x, x.T, x.astype(np.float32)]
    for array in lead_one:
        np.save(path, array)
        ecg, rate, warnings = read_recording(path, ("I",), sample_rate_hz=500)
        np.testing.assert_allclose(ecg, x[:1], atol=1e-6)
        assert (rate, warnings) == (500, [])
    for array in (x, x.T):
        np.save(path, array)
        np.testing.assert_array_equal(read_recording(path, LEADS, sample_rate_hz=500)[0], x)
        for column in ("V2", "8"):
            ecg = read_recording(path, ("I",), sample_rate_hz=500, column=column)[0]
            np.testing.assert_array_equal(ecg, x[7:8])
    np.save(path, np.rint(1e3 * x).astype(np.int16))
    ecg = read_recording(path, LEADS, sample_rate_hz=500, unit="uV")[0]
    np.testing.assert_allclose(ecg, x, atol=1e-3)
    assert refusal(path) == "FILE: its sample rate is not known; give --sample-rate"
    assert "--unit mmHg" in str(pytest.raises(UsageError, read_recording, path, "I", unit="mmHg"))
    np.save(path, x[0])
    assert "no column for lead I, II" in refusal(path, LEADS, sample_rate_hz=500)
    np.save(path, x[:2].T)  # a time and a lead, or two leads?
    assert "(10000, 2)" in refusal(path, sample_rate_hz=500)


# --- the sample rate of a text file ---


@pytest.mark.parametrize(
    "header, rate",
    [
        ("Sample Rate,512 hertz", 512),
        ("Sampling Rate (Hz),500", 500),
        ("# Sampling Rate (Hz):= 125", 125),
        ("Abtastrate;500 Hz", 500),
        ("Rate: 512,5 Hz", 512.5),
        ("Filter,0.05-150 Hz\nSample Rate,500 Hz", 500),
        ("Mains,50 Hz\nSampling Frequency,300 Hz", 300),
        ("Heart Rate,75\nSample Rate,500 Hz", 500),
        ("Sampling rate, Hz: 500", 500),
        ("LP: 150 Hz\nSampling: 500 Hz", 500),
        ("0.05~150Hz\nFrecuencia: 500 Hz\nRed: 60 Hz", 500),
        ("Number of samples: 3000\nRate: 500 Hz", 500),
        ("Recorded 2024-03-01, rate ... see below\n500 Hz", 500),
        ("Sample rate: 1 kHz", 1000),
        ("Sampling frequency 0.5 kHz", 500),
        ("Bandwidth: 0.05-150 Hz\nFrequency: 500 Hz", 500),
        ("Samplingsfrekvens: 512 Hz", 512),
        ("Low cut: 0.5 Hz\nFréquence d'échantillonnage;500 Hz", 500),
        ("Messrate,512 Hertz", 512),
        ("Örnekleme Hızı,512 hertz", 512),
        ("Low pass: 100 Hz\nSample Rate,500 Hz", 500),
        ("Sample Rate,512.844 hertz", 512.844),  # a watch of 2020; it cannot be half a million
        ("Abtastrate;512,844 Hz", 512.844),
        ("Filter: 0.05 - 100 Hz\nNotch filter at 100 Hz\nAbtastrate: 250 Hz", 250),
    ],
)
def test_the_one_frequency_in_a_header(tmp_path, lead_one, header, rate):
    path = write_text(tmp_path / "x.csv", header.splitlines(), [lead_one])
    assert read_recording(path, ("I",))[1] == rate
    ecg, used, warnings = read_recording(path, ("I",), sample_rate_hz=400)
    assert used == 400 and ecg.shape == (1, 3000)
    (warning,) = warnings
    assert f"{rate:g}" in warning and "contradict" in warning


@pytest.mark.parametrize(
    "header",
    [
        "Muscle: 35 Hz",
        "0.05 to 150 Hz",
        "AC 60 Hz",
        "Sampling rate (24 bit): 500",
        "ACC: 208 Hz\nECG: 125 Hz",
        "Bandwidth: 0.05-150 Hz",
        "Bandwidth: 0.05-500 Hz",
        "Filtre: 50 Hz",
        "Netzfrequenz 50 Hz",
        "Filter: 0.05 - 100 Hz",
        "Low pass: 100 Hz",
        "LP 125 Hz",
        "Lowpass: 250 Hz",
        "Sampling 500 Hz, bandwidth 150 Hz",  # whose is which is not for us to say
        "fs=1.2.3",
        "Abtastintervall: 2 ms",
        # Not in the contract any more: a rate without its unit, a number that may be thousands.
        "Sampling frequency: 250",
        "fs=360",
        "Rate: 100,000 Hz",
        "Abtastrate: 1.000 Hz",
    ],
)
def test_a_rate_that_a_header_does_not_state_is_asked_for(tmp_path, lead_one, header):
    path = write_text(tmp_path / "x.csv", header.splitlines(), [lead_one])
    assert refusal(path) == "FILE: its sample rate is not known; give --sample-rate"


@pytest.mark.parametrize(
    "header, step, rate",
    [
        ("time (s)", 1 / 512, 512),
        ("time (ms)", 4, 250),
        ("timestamp [ms]", 2, 500),
        ("time_us", 2000, 500),
        ("timestamp [ns]", 7_812_500, 128),
        ("Time (min)", 1 / 30000, 500),
    ],
)
def test_the_sample_rate_of_a_time_column(tmp_path, lead_one, header, step, rate):
    columns = [1_700 + step * np.arange(3000), lead_one]
    path = write_text(tmp_path / "x.csv", [f"{header},I (mV)"], columns, form="{:.8f}")
    ecg, used, warnings = read_recording(path, ("I",))
    assert used == pytest.approx(rate, rel=1e-3) and warnings == []
    np.testing.assert_allclose(ecg[0], lead_one, atol=1e-5)


@pytest.mark.parametrize("rate", [128, 130, 250, 333, 500, 512])
def test_times_in_whole_milliseconds(tmp_path, lead_one, rate):
    """Steps of 7 and 8 ms are 130 Hz, neither 143 nor 125."""
    times = np.rint(np.arange(3000) * 1000 / rate).astype(int)
    path = tmp_path / "x.csv"
    lines = [f"{t},{v:.4f}" for t, v in zip(times, lead_one, strict=True)]
    path.write_text("\n".join(["time (ms),I", *lines]))
    _, used, warnings = read_recording(path, ("I",))
    assert used == pytest.approx(rate, rel=1e-3) and warnings == []


@pytest.mark.parametrize("stamp", ["%Y-%m-%dT%H:%M:%S.%f", "%H:%M:%S.%f", "%d/%m/%Y %H:%M:%S.%fZ"])
def test_time_stamps_and_a_second_time(tmp_path, source, stamp):
    """As chest straps write: 130 Hz, a stamp, nanoseconds, then the signal in microvolts."""
    uv = np.rint(1e3 * selfmis.resample(source[0, :1], 500, 130)[0]).astype(int)
    start = datetime.datetime(2026, 3, 1, 9, 59, 55)
    lines = ["Phone timestamp;sensor timestamp [ns];ecg [uV]"]
    for i, v in enumerate(uv):
        at = (start + datetime.timedelta(seconds=i / 130)).strftime(stamp)
        lines.append(f"{at};{5 * 10**17 + round(1e9 * i / 130)};{v}")
    path = tmp_path / "strap.txt"
    path.write_text("\n".join(lines))
    ecg, rate, warnings = read_recording(path, ("I",), column="ecg")
    assert rate == pytest.approx(130, rel=1e-3) and warnings == []
    np.testing.assert_allclose(ecg[0], uv / 1e3, atol=1e-9)
    assert "(1 ecg [uV]); give --column" in refusal(path)


def test_times_that_give_no_rate_or_not_evenly(tmp_path, lead_one):
    """Stamps of a clock are words, so they give no rate; a gap or times that run backwards."""
    x, path = np.round(lead_one, 4), tmp_path / "x.csv"
    start = datetime.datetime(2026, 3, 1, 23, 59, 55)
    stamps = [(start + datetime.timedelta(seconds=i / 130)).isoformat() for i in range(len(x))]
    path.write_text("\n".join(["time,I", *(f"{a},{v}" for a, v in zip(stamps, x, strict=True))]))
    assert "sample rate is not known; give --sample-rate" in refusal(path)
    np.testing.assert_allclose(read_recording(path, ("I",), sample_rate_hz=130)[0][0], x)
    ms = 1000 * np.arange(len(x)) / 130
    write_text(path, ["time (ms),I"], [ms + 5000 * (np.arange(len(x)) > 1000), x])
    ecg, rate, (warning,) = read_recording(path, ("I",))
    assert rate == pytest.approx(130, rel=1e-3) and "1 of 2,999 steps" in warning
    np.testing.assert_allclose(ecg[0], x)
    write_text(path, ["500 Hz", "Time (s),I"], [np.arange(3000)[::-1] / 500, x])
    _, rate, warnings = read_recording(path, ("I",))
    assert rate == 500 and "do not grow evenly" in warnings[0]


def test_what_is_no_time_gives_no_rate(tmp_path, lead_one):
    """A counter that lost a sample, and steps of 32, are neither seconds nor milliseconds."""
    lost = np.arange(3000.0) + (np.arange(3000) >= 2000)
    for header, column in (("sample,I", lost), ("timestamp,I", 32.0 * np.arange(3000))):
        path = write_text(tmp_path / "x.csv", [header], [column, lead_one])
        assert "its sample rate is not known" in refusal(path)
        ecg = read_recording(path, ("I",), sample_rate_hz=500)[0]
        np.testing.assert_allclose(ecg[0], lead_one, atol=1e-4)


# --- its unit ---


@pytest.mark.parametrize(
    "header, factor",
    [
        ("Unit,µV", 1e-3),
        ("Unit,μV", 1e-3),
        ("Lead I (uV)", 1e-3),
        ("I_nV", 1e-6),
        ("I [mV]", 1),
        ("Unit: V", 1e3),
        ("I", 1),
        ("ECG I (V)", 1e3),
        ("Lead I (microvolts)", 1e-3),
        ("I (Volts)", 1e3),
        ("Unit: millivolts", 1),
        ("Units: [uV]", 1e-3),
        ("LSB: 2.44 uV\nI", 1),
        ("Calibration: 1 mV\nUnit: uV", 1e-3),
        ("resolution 5 uV/LSB\nI", 1),
        ("Community Hospital\nI", 1),
        ("Lead I\nuV", 1e-3),
    ],
)
def test_the_unit_in_a_header_and_by_flag(tmp_path, lead_one, header, factor):
    lines = ["500 Hz", *header.splitlines()]
    path = write_text(tmp_path / "x.csv", lines, [lead_one / factor], form="{:.9f}")
    np.testing.assert_allclose(read_recording(path, ("I",))[0][0], lead_one, atol=1e-5)
    volts = read_recording(path, ("I",), unit="V")[0][0]
    np.testing.assert_allclose(volts, lead_one / factor * 1e3, rtol=1e-6, atol=1e-5)


def test_the_unit_is_that_of_the_lead(tmp_path, lead_one):
    columns = [np.arange(3000) / 500, lead_one / 1e3, np.full(3000, 7)]
    path = write_text(tmp_path / "x.csv", ["Time,I (V),Marker (mV)"], columns, form="{:.8f}")
    np.testing.assert_allclose(read_recording(path, ("I",))[0][0], lead_one, atol=1e-4)


def test_what_is_no_voltage_or_more_than_one_is_asked_for(tmp_path, lead_one):
    for header, words in (
        ("Unit,mmHg", "mmHg is not a voltage"),
        ("Einheit: bpm", "bpm is not a voltage"),
        ("I (ohm)", "ohm is not a voltage"),
        ("mV\nVolts\nLead I", "the units Volts, mV"),
    ):
        path = write_text(tmp_path / "x.csv", ["500 Hz", *header.splitlines()], [lead_one])
        sentence = refusal(path)
        assert words in sentence and "give --unit" in sentence and "line " in sentence
        np.testing.assert_allclose(read_recording(path, ("I",), unit="mV")[0][0], lead_one, 0, 1e-4)


# --- its column ---


@pytest.mark.parametrize(
    "name, lead",
    [
        ("Lead I", "I"),
        ("LeadI (mV)", "I"),
        ("ECG_I", "I"),
        ("ecg lead i [mV]", "I"),
        ("LEADII", "II"),
        ("avr", "aVR"),
        ("DI", None),  # of digital input
        ("D1", None),
        ("Lead 2", None),
        ("MLII", None),
        ("-aVR", None),
        ("ECG 1", None),
        ("ECG", None),
        ("V10", None),
        ("BioZ I", None),
        ("Impedance I (mV)", None),
    ],
)
def test_a_lead_needs_its_exact_name(tmp_path, source, name, lead):
    columns = source[0, [1, 11], :3000]
    path = write_text(tmp_path / "x.csv", ["500 Hz", f"{name},V6"], columns)
    for wanted in ("I", "II", "aVR"):
        if wanted == lead:
            ecg = read_recording(path, (wanted,))[0]
            np.testing.assert_allclose(ecg[0], columns[0], atol=1e-4)
        else:
            sentence = refusal(path, (wanted,))
            assert f"line 2: no column for lead {wanted} among 2 (1 {name}, 2 V6)" in sentence
            assert sentence.endswith("give --column NAME or its number")
    ecg = read_recording(path, ("I",), column=name)[0]
    np.testing.assert_allclose(ecg[0], columns[0], atol=1e-4)


def test_an_only_column_may_be_another_lead(tmp_path, source):
    x = source[0, 1:2, :3000]
    for header, named in (
        ("Lead,Lead II", "II"),
        ("Leads: II", "II"),
        ("Dérivation,Dérivation II", "II"),
        ("Lead 2", "Lead 2"),
        ("ECG2", "ECG2"),
        ("Resp", "Resp"),
    ):
        path = write_text(tmp_path / "watch.csv", ["500 Hz", header], x)
        assert f"no column for lead I among 1 (1 {named}); give --column" in refusal(path)
    np.testing.assert_allclose(read_recording(path, ("I",), column="1")[0], x, atol=1e-4)
    np.testing.assert_allclose(read_recording(path, ("I",), column="Resp")[0], x, atol=1e-4)


def test_several_columns_of_text_need_names(tmp_path, source):
    """Twelve numbers in a line may be leads in any order, or a counter and an accelerometer."""
    x, order = source[0, :, :3000], [*range(6, 12), *range(6)]
    path = write_text(tmp_path / "x.csv", ["500 Hz"], x)
    for leads in (LEADS, ("I",)):
        sentence = refusal(path, leads)
        assert "line 2: 12 columns of numbers and no line of names; write one" in sentence
    names = ",".join("Lead" + LEADS[i] for i in order)
    path = write_text(tmp_path / "y.csv", ["500 Hz", names], x[order])
    np.testing.assert_allclose(read_recording(path, LEADS)[0], x, atol=1e-4)
    names = ",".join(f"channel {i + 1}" for i in range(12))
    path = write_text(tmp_path / "z.csv", ["500 Hz", names], x[order])
    assert refusal(path, LEADS).endswith("name them I, II, ...")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_of_words_between_those_of_numbers(tmp_path, source, separator):
    """A date, a mark that is mostly empty, a word in every line."""
    x = np.round(source[0, :2, :3000], 4)
    marks = {700: "PVC", 2990: "button" if separator == "," else "button, long"}
    lines = [["Date", "Time", "I", "Beat", "Event", "II"]]
    for i in range(3000):
        at = f"12:00:{i / 500:06.3f}"
        lines.append(["2026-03-01", at, str(x[0, i]), "Normal", marks.get(i, ""), str(x[1, i])])
    path = tmp_path / "x.csv"
    path.write_text("\n".join(map(separator.join, lines)))
    for lead, wanted in (("I", x[0]), ("II", x[1])):
        ecg, _, warnings = read_recording(path, (lead,), sample_rate_hz=500)
        assert warnings == []
        np.testing.assert_array_equal(ecg[0], wanted)
    lines[2001][2] = "off"  # a single word among numbers is a missing sample
    path.write_text("\n".join(map(separator.join, lines)))
    ecg, _, warnings = read_recording(path, ("I",), sample_rate_hz=500)
    x[0, 2000] = x[0, [1999, 2001]].mean()
    np.testing.assert_allclose(ecg[0], x[0], atol=1e-12)
    assert warnings == []


def test_names_that_need_a_flag_and_those_that_do_not(tmp_path, source):
    x, path = source[0, :2, :3000], tmp_path / "x.csv"
    write_text(path, ["500 Hz", "Impedance I (kOhm),ECG I (mV)"], x[::-1])
    np.testing.assert_allclose(read_recording(path, ("I",))[0][0], x[0], atol=1e-4)
    write_text(path, ["500 Hz", "noise ECG,ECG"], x[::-1])
    np.testing.assert_allclose(read_recording(path, ("I",), column="ECG")[0][0], x[0], atol=1e-4)
    write_text(path, ["500 Hz", "I,I"], x)
    assert "no column for lead I among 2 (1 I, 2 I)" in refusal(path)
    np.testing.assert_allclose(read_recording(path, ("I",), column="2")[0][0], x[1], atol=1e-4)
    index = np.arange(3000)  # of a data frame
    write_text(path, [",time,ecg"], [index, index / 500, x[0]])
    assert "(1 (no name), 2 ecg); give --column" in refusal(path)
    ecg, rate, _ = read_recording(path, ("I",), column="ecg")
    np.testing.assert_allclose(ecg[0], x[0], atol=1e-4)
    assert rate == pytest.approx(500)


# --- its numbers ---


@pytest.mark.parametrize("end", ["as recorded", "still", "whole microvolts", "rising by one"])
def test_a_column_with_decimal_commas_is_no_table_of_two(tmp_path, source, end):
    """Whatever the recording ends with."""
    uv = np.round(1e3 * selfmis.resample(source[0, :1], 500, 512)[0], 3)
    ends = {"still": np.full(60, 12.5), "whole microvolts": np.rint(uv[-60:])}
    ends["rising by one"] = 3.25 + np.arange(60)
    uv[-60:] = ends.get(end, uv[-60:])
    path = write_text(tmp_path / "x.csv", APPLE_DE, [uv], form="{:.3f}", comma=True)
    ecg, rate, warnings = read_recording(path, ("I",))
    assert (rate, warnings) == (512, [])
    np.testing.assert_allclose(ecg[0], uv / 1e3, atol=1e-9)
    path.write_text(path.read_text().replace(",000\n", "\n"))  # some locales write 12, not 12,000
    np.testing.assert_allclose(read_recording(path, ("I",))[0][0], uv / 1e3, atol=1e-9)


@pytest.mark.parametrize(
    "end",
    [
        ["Ableitung,Ableitung I", "Einheit,µV"],
        ["Ableitung,Ableitung I", "Einheit,µV", "Lead,Lead I"],
        ["Einheit,µV", "Lead,Lead I"],
        ["Einheit,µV", ""],
    ],
)
def test_a_watch_whose_header_ends_in_other_lines(tmp_path, lead_one, end):
    uv = np.round(1e3 * lead_one, 1)
    header = [*APPLE_DE[:-3], *end]
    path = write_text(tmp_path / "x.csv", header, [uv], form="{:.1f}", comma=True)
    np.testing.assert_allclose(read_recording(path, ("I",))[0][0], uv / 1e3, atol=1e-9)


def test_two_columns_of_whole_numbers_are_no_decimal_commas(tmp_path, lead_one):
    """Milliseconds and the steps of a converter, without a sign and without a point."""
    steps = np.rint(200 * lead_one).astype(int) + 512
    times = np.rint(np.arange(len(steps)) / 0.512).astype(int)
    path = write_text(tmp_path / "x.csv", ["time_ms,adc"], [times, steps], form="{}")
    ecg, rate, _ = read_recording(path, ("I",), column="adc")
    assert rate == pytest.approx(512, rel=1e-3) and np.array_equal(ecg[0], steps)
    for name, first in (("I", steps), ("n", np.arange(3000) % 16)):
        path = write_text(path, ["500 Hz", f"{name},II"], [first, steps + 3], form="{}")
        assert np.array_equal(read_recording(path, ("II",))[0][0], steps + 3)


def test_a_quiet_end_of_two_signed_columns(tmp_path, source):
    """Whose last lines alone could be decimal commas."""
    uv = np.rint(1e3 * source[0, :2, :3000]).astype(int)
    uv[:, -1600:] = np.abs(uv[:, -1600:])
    path = write_text(tmp_path / "x.csv", ["500 Hz", "Unit: uV", "I,II"], uv, form="{}")
    np.testing.assert_allclose(read_recording(path, ("II",))[0][0], uv[1] / 1e3)


def test_decimal_commas_of_a_small_signal_in_millivolts(tmp_path, source):
    """Under 1 mV all whole parts are 0, which no time is."""
    mv = np.round(0.3 * source[0, 0, :4000] / np.abs(source[0, 0]).max(), 4)
    path = write_text(tmp_path / "x.csv", ["500 Hz", "Einheit: mV"], [mv], comma=True)
    np.testing.assert_allclose(read_recording(path, ("I",))[0][0], mv, atol=1e-9)
    assert "0,0" in path.read_text()


def test_quoted_decimal_commas_in_several_columns(tmp_path, source):
    path, lines = tmp_path / "x.csv", ['"Zeit","II (mV)","I (mV)"']
    for i, row in enumerate(source[0, [1, 0]].T):
        lines.append(",".join(f'"{value:.4f}"'.replace(".", ",") for value in (i / 500, *row)))
    path.write_text("\n".join(lines))
    ecg, rate, warnings = read_recording(path, ("I",))
    assert rate == pytest.approx(500, rel=1e-3) and warnings == []
    np.testing.assert_allclose(ecg[0], source[0, 0], atol=6e-5)


def test_what_spreadsheets_and_locales_do_to_numbers(tmp_path, lead_one):
    x = np.round(lead_one, 4)
    text = "500 Hz\nI (mV)\n" + "\n".join(map(str, x)) + "\n"
    (tmp_path / "wide.txt").write_bytes(text.encode("utf-16"))  # "Unicode text" of spreadsheets
    (tmp_path / "minus.txt").write_text(text.replace("-", "\u2212"), encoding="utf-8")
    lines = text.splitlines()
    for i, empty in enumerate(("NA", "#N/A", "null", "--", "", "Ende")):
        lines[102 + 2 * i] = empty
        x[100 + 2 * i] = (x[99 + 2 * i] + x[101 + 2 * i]) / 2
    (tmp_path / "empty.txt").write_text("\n".join(lines))
    for name, atol in (("wide", 0.3), ("minus", 0.3), ("empty", 1e-9)):
        ecg, _, warnings = read_recording(tmp_path / f"{name}.txt", ("I",))
        np.testing.assert_allclose(ecg[0], x, atol=atol)
        np.testing.assert_allclose(np.delete(ecg[0], range(99, 112)), np.delete(x, range(99, 112)))
        assert warnings == []


def test_what_else_stands_between_numbers(tmp_path, lead_one):
    """Exponents, points without decimals, empty lines, gaps at the start, other line ends."""
    x, path = np.round(lead_one, 4), tmp_path / "x.csv"
    seconds = np.arange(3000) / 500
    rows = [f"{t:.3f},{v:.4f}" for t, v in zip(seconds, x, strict=True)]
    exponents = [f"{t:.6e},{v:.6E}" for t, v in zip(seconds, x, strict=True)]
    column = [f"{v:.4f}" for v in x]
    for lines, end in (
        (["time,I", *exponents], "\n"),
        (["time,I", "s,mV", "", *rows], "\n"),
        (["500 Hz", "I", "nan", "", *column], "\n"),
        (["time, I", *(row.replace(",", ", ") for row in rows)], "\r\n"),
        (["500 Hz", "I", *column], "\r"),
        (["Leads: I", "Rate: 500 Hz", *column], "\n"),
    ):
        path.write_bytes(end.join(lines).encode())
        ecg, rate, warnings = read_recording(path, ("I",))
        np.testing.assert_allclose(ecg[0], x, atol=1e-9)
        assert rate == pytest.approx(500) and warnings == []
    path.write_text("\n".join(["500 Hz", "I", *(f"{1000 * v:.0f}." for v in x)]))
    np.testing.assert_allclose(read_recording(path, ("I",))[0][0], 1000 * x, atol=0.51)
    # Every second line is empty: that is no missing sample, the rate would be wrong.
    path.write_text("\n\n".join(["500 Hz", "I", *column]))
    assert "line 6, column I: '' is not a number" in refusal(path)


@pytest.mark.parametrize("word", ["", "NaN", "Ende"])
def test_decimal_commas_survive_a_word(tmp_path, lead_one, word):
    uv = np.round(1e3 * lead_one, 3)
    lines = [f"{v:.3f}".replace(".", ",") for v in uv]
    lines[1500], uv[1500] = word, (uv[1499] + uv[1501]) / 2
    (tmp_path / "x.csv").write_text("\n".join([*APPLE_DE, *lines, "", ""]))
    ecg, _, warnings = read_recording(tmp_path / "x.csv", ("I",))
    assert warnings == []
    np.testing.assert_allclose(ecg[0], uv / 1e3, atol=1e-9)


@pytest.mark.parametrize("point, other", [(",", "."), (".", ",")])
def test_grouped_thousands_are_not_guessed(tmp_path, lead_one, point, other):
    """1.234 may be a number or a thousand and more; 1.234,5 is no number at all."""
    uv = np.rint(1500 * lead_one / np.abs(lead_one).max()).astype(int)
    grouped = [f"{v:,}".replace(",", point) for v in uv]
    path = tmp_path / "x.csv"
    path.write_text("\n".join(["500 Hz", "Unit: uV", "Lead I", *grouped]))
    sentence = refusal(path)
    first = next(i for i, text in enumerate(grouped) if point in text)
    assert f"line {first + 4}, column Lead I: '{grouped[first]}' may be a decimal" in sentence
    path = tmp_path / "x.tsv"
    both = [f"{v:,.1f}".replace(",", "_").replace(".", other).replace("_", point) for v in uv]
    rows = [f"{i / 500}\t{text}" for i, text in enumerate(both)]
    path.write_text("\n".join(["Unit: uV", "time\tLead I", *rows]))
    assert f"'{both[first]}' is not a number" in refusal(path)
    path.write_text("\n".join(["Unit: uV", "time\tLead I", *rows]).replace(point, ""))
    np.testing.assert_allclose(read_recording(path, ("I",), sample_rate_hz=500)[0][0], uv / 1e3)


def test_odd_bytes_give_an_answer_or_one_sentence(tmp_path):
    rng = np.random.default_rng(0)
    # fmt: off
    pieces = [*"0123456789", *"0123456789", ".", ",", ";", "\t", " ", "-", ":", "\n", "\n", "e",
              "T", '"', "'", "nan", "Hz", "I", "mV", "#", "12:00:00", "fs=500\n"]
    # fmt: on
    for i in range(150):
        path = tmp_path / f"{i}.csv"
        path.write_text("500 Hz\n" * int(rng.integers(2)) + "".join(rng.choice(pieces, 400)))
        try:
            ecg, rate, _ = read_recording(path, ("I",))
            assert np.isfinite(ecg).all() and rate > 0
        except UsageError as error:
            assert str(path) in str(error)


# --- missing samples ---


def test_short_gaps_are_bridged_and_long_ones_take_the_median(tmp_path, lead_one):
    for offset in (0, 5):
        x = lead_one + offset
        holes = x.copy()
        holes[100:149] = np.nan  # 98 ms
        holes[0] = np.inf
        holes[1000:1050] = np.nan  # 0.1 s
        np.save(tmp_path / "x.npy", holes)
        ecg, _, warnings = read_recording(tmp_path / "x.npy", ("I",), sample_rate_hz=500)
        np.testing.assert_allclose(ecg[0, 99:150], np.linspace(x[99], x[149], 51))
        assert ecg[0, 0] == x[1]
        assert np.all(ecg[0, 1000:1050] == np.median(holes[np.isfinite(holes)]))
        kept = np.isfinite(holes)
        np.testing.assert_array_equal(ecg[0, kept], x[kept])
        (warning,) = warnings
        assert warning.startswith("100 of 3,000 samples are missing, 50 of them in gaps of 0.1 s")
    np.save(tmp_path / "x.npy", np.full(3000, np.nan))
    assert "no sample is a number" in refusal(tmp_path / "x.npy", sample_rate_hz=500)


def test_a_lead_without_any_sample_stays_at_zero():
    ecg = np.stack([np.ones(100), np.full(100, np.nan)])
    filled, lost = fill_gaps(ecg, 100)
    np.testing.assert_array_equal(filled, [np.ones(100), np.zeros(100)])
    assert lost.shape == ecg.shape


# --- WFDB ---


def test_a_record_by_its_name_its_header_or_its_data(tmp_path, source):
    write_record(tmp_path / "r", source[0], rate=500)
    for given in ("r", "r.hea", "r.dat"):
        ecg, rate, warnings = read_recording(tmp_path / given, ("I",), unit="uV")
        assert warnings == ["--unit is ignored: a WFDB record states its unit"] and rate == 500
        np.testing.assert_allclose(ecg[0], source[0, 0], atol=1e-3)
    ecg = read_recording(tmp_path / "r", ("I",), column="V2")[0]
    np.testing.assert_allclose(ecg[0], source[0, 7], atol=1e-3)
    (tmp_path / "x.edf").write_bytes(b"0       ")
    assert refusal(tmp_path / "x.edf").startswith("FILE: neither a WFDB record nor .csv")
    for name in ("nobody", "nobody.mat", "nobody.csv", "nobody.npy"):
        with pytest.raises(UsageError, match="nobody.*(there is no such|No such file)"):
            read_recording(tmp_path / name, ("I",))


def test_a_name_with_a_point_is_no_ending(tmp_path, source):
    write_record(tmp_path / "r", source[0], rate=500)
    (tmp_path / "p.1.hea").write_text((tmp_path / "r.hea").read_text())
    write_record(tmp_path / "p", source[1], rate=500)
    ecg = read_recording(tmp_path / "p.1", ("I",))[0]
    np.testing.assert_allclose(ecg[0], source[0, 0], atol=1e-3)


def test_missing_samples_of_a_record(tmp_path, source):
    x = source[0] + 2
    x[0, 1000:1060] = np.nan
    write_record(tmp_path / "r", x, rate=500)
    ecg, _, warnings = read_recording(tmp_path / "r", ("I",))
    assert "60 of 10,000 samples are missing" in warnings[0]
    np.testing.assert_allclose(ecg[0, 1000:1060], np.nanmedian(x[0]), atol=1e-3)


def test_a_header_that_contradicts_its_samples(tmp_path, source):
    """It states another format, or belongs to another file."""
    write_record(tmp_path / "r", source[0], rate=500)
    write_record(tmp_path / "other", source[1], rate=500)
    text, samples = (tmp_path / "r.hea").read_text(), (tmp_path / "r.dat").read_bytes()
    assert read_recording(tmp_path / "r", ("I",))[2] == []
    for header, data in (
        (text.replace("r.dat 16 ", "r.dat 212 "), samples),
        (text, (tmp_path / "other.dat").read_bytes()),
    ):
        (tmp_path / "r.hea").write_text(header)
        (tmp_path / "r.dat").write_bytes(data)
        warnings = read_recording(tmp_path / "r", ("I",))[2]
        assert "the checksum in its header is not that of its samples" in warnings[0]


# --- inputs that people reported (the cases of November 2026) ---


def beat_train(rate, seconds):
    """A plain lead I in mV, to the microvolt."""
    t = np.arange(int(rate * seconds)) / rate
    phase = (t % 0.83) - 0.35
    x = np.exp(-0.5 * (phase / 0.011) ** 2) - 0.2 * np.exp(-0.5 * ((phase - 0.03) / 0.01) ** 2)
    x += 0.28 * np.exp(-0.5 * ((phase - 0.26) / 0.045) ** 2) + 0.02 * np.sin(2 * t)
    return np.rint(1000 * x) / 1000


def write_lines(path, *lines, encoding="utf-8"):
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return path


@pytest.mark.parametrize(
    "label, lead, unit",
    [
        ("Messrate,512 Hertz", "Ableitung,Ableitung I", "Einheit,µV"),
        ("Meetfrequentie,512 hertz", "Afleiding,Afleiding I", "Eenheid,µV"),
        ("Örnekleme Hızı,512 hertz", "Derivasyon,Derivasyon I", "Birim,µV"),
    ],
)
def test_case_a_watch_in_other_languages(tmp_path, label, lead, unit):
    x = beat_train(512, 6)
    head = ["Name,Test", 'Geburtstag,"01.01.1990"', "Softwareversion,2.0", 'Gerät,"Watch6,7"']
    numbers = [f"{1000 * v:.3f}".replace(".", ",") for v in x]
    path = write_lines(tmp_path / "x.csv", *head, label, "", "", lead, unit, "", *numbers)
    ecg, rate, warnings = read_recording(path, ("I",))
    assert (rate, warnings) == (512, [])
    np.testing.assert_allclose(ecg[0], x, atol=1e-9)


def test_case_two_title_lines_of_rdsamp(tmp_path):
    x = beat_train(125, 6)
    rows = [f"{i / 125:.3f},{v:.3f},0.1" for i, v in enumerate(x)]
    titles = ["'Elapsed time','MLII','V5'", "'seconds','mV','mV'"]
    path = write_lines(tmp_path / "r.csv", *titles, *rows)
    for column in ("MLII", "1"):
        ecg, rate, warnings = read_recording(path, ("I",), column=column)
        np.testing.assert_array_equal(ecg[0], x)
        assert rate == pytest.approx(125) and warnings == []
    assert "line 2: no column for lead I among 2 (1 MLII (mV), 2 V5 (mV))" in refusal(path)


def test_case_columns_that_are_no_lead(tmp_path):
    """A digital input and an impedance are asked for, not taken as lead I."""
    x = beat_train(125, 6)
    rows = [f"{i % 16},{int(i > 250)},{v:.3f}" for i, v in enumerate(x)]
    head = ["# Sampling Rate (Hz):= 125", "nSeq,DI,CH1"]
    path = write_lines(tmp_path / "o.csv", *head, *rows)
    assert "line 2: no column for lead I among 3 (1 nSeq, 2 DI, 3 CH1); give" in refusal(path)
    ecg, rate, _ = read_recording(path, ("I",), column="CH1")
    assert rate == 125 and np.array_equal(ecg[0], x)
    rows = [f"{i / 125:.3f},{v:.3f},{25 + np.sin(i / 70):.3f}" for i, v in enumerate(x)]
    path = write_lines(tmp_path / "b.csv", "time (s),ECG (mV),BioZ I (ohm)", *rows)
    assert "among 2 (1 ECG (mV), 2 BioZ I (ohm)); give --column" in refusal(path)
    np.testing.assert_array_equal(read_recording(path, ("I",), column="ECG")[0][0], x)
    assert "ohm is not a voltage" in refusal(path, column="BioZ I")


def test_case_headers_that_begin_with_digits(tmp_path):
    x = beat_train(125, 6)
    head = ["rec.acq", "8 msec/sample", "2 channels", "ECG", "mV", "RSP", "Volts", "CH1\tCH2\t"]
    rows = [f"{v:.4f}\t0.1\t" for v in x]
    path = write_lines(tmp_path / "a.txt", *head, "750\t750\t", *rows)
    flags = {"column": "CH1", "sample_rate_hz": 125}
    assert "line 9: the header states the units Volts, mV; give --unit" in refusal(path, **flags)
    ecg, _, warnings = read_recording(path, ("I",), unit="mV", **flags)
    np.testing.assert_allclose(ecg[0], x, atol=1e-9)
    assert warnings == []
    head = ["Patient,Test", "2021-05-16", "10:08:46", "Sample Rate: 125 Hz", "Unit: uV", "Lead I"]
    path = write_lines(tmp_path / "b.csv", *head, *(f"{1000 * v:.0f}" for v in x))
    ecg, rate, warnings = read_recording(path, ("I",))
    np.testing.assert_allclose(ecg[0], x, atol=1e-9)
    assert (rate, warnings) == (125, [])


def test_case_lost_packets(tmp_path):
    """The usual step gives the rate; that steps are uneven is said."""
    x = beat_train(130, 10)
    kept = [i for i in range(len(x)) if i % 40 not in (7, 8, 9, 10, 11)]
    rows = [f"{i * 1000 / 130:.3f};{1000 * x[i]:.0f}" for i in kept]
    path = write_lines(tmp_path / "x.csv", "timestamp [ms];I [uV]", *rows)
    ecg, rate, (warning,) = read_recording(path, ("I",))
    assert rate == pytest.approx(130, rel=1e-3) and "steps): samples may be lost" in warning
    np.testing.assert_allclose(ecg[0], x[kept], atol=1e-9)


def test_case_all_samples_in_one_line(tmp_path):
    values = [f"{v:.3f}" for v in beat_train(300, 4)]
    row = f'2022-01-01T10:00:00+01:00,1,300,4,1,"[{",".join(values)}]",,,'
    path = write_lines(tmp_path / "a.csv", "date,type,frequency,duration,position,signal", row, row)
    assert "line 2 holds 1,20" in refusal(path) and "one sample a line is exp" in refusal(path)
    voltage = "Voltage Measurements," + ",".join(values)
    path = write_lines(tmp_path / "b.csv", "Start,2025", "Sampling Frequency (Hz),300", voltage)
    assert "line 3 holds 1,200 numbers" in refusal(path)


def test_case_single_missing_samples(tmp_path):
    x = beat_train(125, 6)
    gone = np.zeros(len(x), bool)
    gone[np.random.default_rng(1).choice(len(x), len(x) // 7, replace=False)] = True
    cells = ["" if missing else f"{v:.3f}" for missing, v in zip(gone, x, strict=True)]
    path = write_lines(tmp_path / "g.csv", "Sample rate: 125 Hz", "I [mV]", *cells)
    ecg, _, warnings = read_recording(path, ("I",))
    want = np.interp(np.arange(len(x)), np.flatnonzero(~gone), x[~gone])
    np.testing.assert_allclose(ecg[0], want)
    (warning,) = warnings
    assert warning.startswith("107 of 750 samples are missing, 0 of them in gaps")
    cells = [f"{v:.3f}" if i % 50 else "" for i, v in enumerate(x)]  # few are not worth a word
    path = write_lines(tmp_path / "f.csv", "Sample rate: 125 Hz", "I [mV]", *cells)
    assert read_recording(path, ("I",))[2] == []


def test_case_words_in_the_column(tmp_path):
    path = write_lines(tmp_path / "w.csv", "time,I", *(f"{i / 125:.3f},abc" for i in range(500)))
    assert refusal(path) == "FILE: line 2, column I: 'abc' is not a number"


def test_case_one_signal_named_ecg(tmp_path):
    """A hand-held device; the path is that of the .mat beside its .hea."""
    x = beat_train(300, 12)
    samples = np.rint(1000 * x).astype("<i2")
    head = struct.pack("<iiiii", 30, 1, len(x), 0, 4) + b"val\0"
    (tmp_path / "A1.mat").write_bytes(head + samples.tobytes())
    checksum = int(samples.sum(dtype=int)) % 65536
    line = f"A1.mat 16+24 1000/mV 16 0 {samples[0]} {checksum} 0 ECG"
    write_lines(tmp_path / "A1.hea", f"A1 1 300 {len(x)}", line)
    for given in ("A1", "A1.hea", "A1.mat"):
        ecg, rate, warnings = read_recording(tmp_path / given, ("I",), column="ECG")
        np.testing.assert_allclose(ecg[0], x, atol=1e-9)
        assert (rate, warnings) == (300, [])
        with pytest.raises(UsageError, match="no lead I.*ECG.*give --column NAME"):
            read_recording(tmp_path / given, ("I",))


@pytest.mark.parametrize("sign, encoding", [("µ", "utf-8"), ("µ", "latin-1"), ("μ", "utf-8")])
def test_case_a_micro_sign_in_a_header(tmp_path, sign, encoding):
    """It would be read as volts: a factor of a million. (selfmis.read_wfdb)"""
    x = beat_train(100, 12)
    samples = np.rint(1000 * x).astype("<i2")
    (tmp_path / "m.dat").write_bytes(samples.tobytes())
    checksum = int(samples.sum(dtype=int)) % 65536
    line = f"m.dat 16 1/{sign}V 16 0 {samples[0]} {checksum} 0 I"
    write_lines(tmp_path / "m.hea", f"m 1 100 {len(x)}", line, encoding=encoding)
    with pytest.raises(UsageError, match="m.hea: a unit with a micro sign, .* write uV"):
        read_recording(tmp_path / "m", ("I",))


def test_case_a_header_of_another_format(tmp_path):
    samples = np.rint(1000 * beat_train(500, 10)).astype("<i2")
    (tmp_path / "h.dat").write_bytes(samples.tobytes())
    write_lines(tmp_path / "h.hea", f"h 1 500 {len(samples)}", "h.dat 212 1000/mV 12 0 0 0 0 I")
    warnings = read_recording(tmp_path / "h", ("I",))[2]
    assert any("checksum" in warning and "another format" in warning for warning in warnings)


# --- what looks wrong with a recording ---


def clean(rate=500):
    """Lead I of six patients with little noise."""
    ecg, _ = synthesize(6, 11, types="NORM", sample_rate_hz=rate, noise=0.3)
    return ecg[:, 0].astype(float)


def electrode_off(x, rate):
    x = x.copy()
    x[4 * rate : 6 * rate] = x[0]
    return x


def saturated(x, rate):
    return np.clip(x, np.quantile(x, 0.05), np.quantile(x, 0.95))


def with_mains(x, rate):
    return x + 0.4 * np.sin(2 * np.pi * 49.3 * np.arange(len(x)) / rate)


def with_muscle(x, rate):
    return x + 0.3 * np.random.default_rng(0).standard_normal(len(x))


def with_motion(x, rate):
    """Larger than the ECG and nearly as slow: no fast noise is in it."""
    t, random = np.arange(len(x)) / rate, np.random.default_rng(0)
    waves = [np.sin(2 * np.pi * (f * t + random.random())) for f in random.uniform(2, 12, 20)]
    return x + 0.5 * x.std() * np.sum(waves, axis=0)


DEFECTS = {
    "swapped arms": (lambda x, rate: -x, "points down"),
    "electrode off": (electrode_off, "does not change for 2.0 s"),
    "saturated": (saturated, "saturated"),
    "microvolts": (lambda x, rate: 1000 * x, "--unit uV"),
    "volts": (lambda x, rate: x / 1000, "--unit"),
    "mains": (with_mains, "noisy"),
    "muscle": (with_muscle, "noisy"),
    "motion": (with_motion, "noisy or has beats of two kinds"),
}


@pytest.mark.parametrize("rate", [100, 512])
def test_each_defect_has_its_warning_and_a_sound_recording_none(rate):
    for x in clean(rate):
        assert check_recording(x[None], rate, ("I",)) == []
        for name, (damage, word) in DEFECTS.items():
            found = check_recording(damage(x, rate)[None], rate, ("I",))
            assert any(word in text for text in found), (name, found)
            assert all("lead I " in text for text in found)
            assert len(found) == 1 or word == "noisy", (name, found)


@pytest.mark.parametrize("rate", [100, 250, 500])
def test_the_heart_rate_and_a_wrong_sample_rate(rate):
    x = beat_train(rate, 10)  # 72 beats a minute
    assert beats_a_minute(without_wander(x, rate)) == pytest.approx(72, abs=1)
    assert check_recording(x[None], rate, ("I",)) == []
    for wrong in (0.5, 2):
        (sentence,) = check_recording(x[None], wrong * rate, ("I",))
        found = int(re.search(r"has (\d+) beats a minute: is the sample rate right", sentence)[1])
        assert found == pytest.approx(72 * wrong, abs=2)
    assert beats_a_minute(x[:rate]) is None


def test_an_irregular_rhythm_is_no_noise_and_two_beats_tell_nothing():
    t = np.arange(1000) / 100
    random = np.random.default_rng(0)

    def rhythm(places):
        beat = sum(np.exp(-(((t - at) / 0.02) ** 2)) for at in places)
        t_wave = sum(0.2 * np.exp(-(((t - at - 0.25) / 0.05) ** 2)) for at in places)
        return beat + t_wave + 0.01 * random.standard_normal(len(t))

    irregular = rhythm(np.cumsum(random.uniform(0.4, 1.2, 11)))
    assert len(cut_beats(irregular)) >= 8 and not beats_differ(irregular)
    every_second = rhythm(np.arange(1, 9)) - 2 * rhythm(np.arange(2, 9, 2))
    assert beats_differ(every_second)  # as the docstring says
    opposite = (rhythm([1]) - rhythm([2]))[:300]
    assert len(cut_beats(opposite)) == 2 and not beats_differ(opposite)


@pytest.mark.parametrize("T", [1, 5, 100])
def test_a_moment_is_not_looked_at(T):
    assert not any("beats" in text for text in check_recording(np.ones((1, T)), 100, ("I",)))


def test_an_electrode_off_for_most_of_the_time_is_no_noise():
    for x in clean(100):
        x[200:900] = x[200]
        found = check_recording(x[None], 100, ("I",))
        assert len(found) == 1 and "does not change for 7" in found[0]


def test_a_warning_names_the_lead_and_only_lead_one_can_be_swapped():
    x = synthesize(1, 11, types="NORM", sample_rate_hz=250)[0][0].astype(float)
    before = check_recording(x, 250, LEADS)
    x[rows_of(["V2"])] *= 1000
    x[rows_of(["II"])] *= -1
    added = [text for text in check_recording(x, 250, LEADS) if text not in before]
    assert len(added) == 1 and added[0].startswith("lead V2 ")


@pytest.mark.parametrize(
    "value, word", [(-32.768, "a spike of 32.8 mV"), (3000, "a spike of 3e"), (None, "")]
)
def test_a_mark_among_the_samples_is_a_spike(lead_one, value, word):
    x = lead_one.copy()
    if value is not None:
        x[700] = value
    found = " ".join(check_recording(x[None], 500, ("I",)))
    assert word in found and ("spike" in found) == (value is not None)


def test_rates_that_contradict_each_other_are_said_and_the_flag_wins(tmp_path, source):
    x, seconds = source[0], np.arange(source.shape[2]) / 500
    write_record(tmp_path / "r", x, rate=500)
    header = write_text(tmp_path / "header.csv", APPLE, 1000 * x[:1])
    names = ["Sample Rate,512 hertz", "time,I"]
    column = write_text(tmp_path / "column.csv", names, [seconds, x[0]])
    for path, flag, used, others in (
        (tmp_path / "r", 250, 250, ["500"]),
        (header, 250, 250, ["512"]),
        (column, None, 500, ["512"]),  # measured, where a header may speak of something else
        (column, 250, 250, ["512", "500"]),
    ):
        _, rate, (text,) = read_recording(path, ("I",), sample_rate_hz=flag)
        assert rate == used and "contradict" in text
        assert all(other in text for other in (str(used), *others))
    assert read_recording(header, ("I",), sample_rate_hz=512)[2] == []
    assert "5 Hz by the --sample-rate is no sample rate" in refusal(header, sample_rate_hz=5)


ROOT = os.environ.get("SELFMIS_PTBXL")


@pytest.mark.skipif(not ROOT, reason="SELFMIS_PTBXL names no PTB-XL root")
@pytest.mark.parametrize("rate, kind", [(100, "NORM"), (100, "MI"), (500, "NORM"), (500, "MI")])
def test_swapped_arms_are_noticed_on_real_records_and_false_alarms_are_rare(rate, kind):
    """Up to 200 records of fold 9 at 100 Hz, of all folds at 500 Hz, where few are at hand.

    Some infarcts do point down in lead I.
    """
    records = selfmis.find_records(ROOT, sample_rate_hz=rate)
    infarct = records.labels[:, NINE].any(1)
    wanted = infarct if kind == "MI" else records.labels[:, STATEMENTS.index("NORM")] > 0
    words, noticed, read = ("points down", "noisy", "saturated", "does not change", "spans"), 0, 0
    counts = dict.fromkeys(words, 0)
    for i in np.flatnonzero(wanted & ((records.folds == 9) | (rate == 500))):
        if read == 200 or not os.path.exists(f"{records.name(i)}.hea"):
            continue
        ecg, read = selfmis.read_ecg(records.name(i), ("I",), rate), read + 1
        found = " ".join(check_recording(ecg, rate, ("I",)))
        for word in words:
            counts[word] += word in found
        noticed += "points down" in " ".join(check_recording(-ecg, rate, ("I",)))
    if read < 40:
        pytest.skip(f"{read} such records")
    each = ", ".join(f"{word} {100 * n / read:.1f} %" for word, n in counts.items())
    print(f"\n{read} {kind} records at {rate} Hz: {noticed} swapped arms noticed; without: {each}")
    assert noticed >= (0.95 if kind == "NORM" else 0.85) * read
    assert counts["points down"] <= max(1, (0.02 if kind == "NORM" else 0.15) * read)
    # After an infarct more hearts have extra beats.
    assert counts["noisy"] <= max(2, (0.02 if kind == "NORM" else 0.05) * read)
    assert all(counts[word] <= max(1, 0.015 * read) for word in words[2:])
