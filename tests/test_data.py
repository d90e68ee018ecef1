"""Signals, record lists, pairs and the pass over the records."""

import csv
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MIMIC_ORDER, PTBXL_NAMES, TINY, made_up, write_record
from torch.utils.data import DataLoader

import selfmis
from extras.synthetic import SYNTHETIC_TYPES, synthesize
from selfmis import LEADS, SelfCuttingDataset, UsageError, find_records
from selfmis import preprocess, read_ecg, read_pairs, resample, self_cut
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain


@pytest.fixture(scope="module")
def ecg():
    return made_up(1, seed=3)[0][0]  # (12, 1000) mV


# --------------------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, unit, adu",
    [
        (LEADS, "mV", 1000),
        (PTBXL_NAMES, "uV", 1),
        (MIMIC_ORDER, "mV", 1000),
        (LEADS[::-1], "V", 1e6),
    ],
)
def test_leads_are_found_by_name_and_units_become_millivolts(tmp_path, ecg, names, unit, adu):
    upper = [name.upper() for name in LEADS]
    order = [upper.index(name.upper()) for name in names]
    write_record(tmp_path / "r", ecg[order], names, unit=unit, adu=adu)
    got = read_ecg(tmp_path / "r.hea", sample_rate_hz=100)
    assert got.dtype == np.float32 and got.shape == ecg.shape
    np.testing.assert_allclose(got, ecg, atol=1.01e-3)
    np.testing.assert_array_equal(read_ecg(tmp_path / "r", ["avl", "I"], 100), got[[4, 0]])
    one = read_ecg(tmp_path / "r", "II", 100)  # a name, not two leads I
    np.testing.assert_array_equal(one, got[1:2])
    np.testing.assert_array_equal(synthesize(1, 3, leads="II", sample_rate_hz=100)[0][0], ecg[1:2])


def test_invalid_samples_become_zero(tmp_path, ecg):
    broken = ecg.copy()
    broken[0, 10:20] = np.nan
    write_record(tmp_path / "r", broken)
    got = read_ecg(tmp_path / "r", sample_rate_hz=100)
    assert (got[0, 10:20] == 0).all() and np.isfinite(got).all() and got[1, 10:20].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_preprocess_takes_nan_and_infinity_as_zero(ecg, bad):
    broken, zeroed = ecg.copy(), ecg.copy()
    broken[3, 5:9], zeroed[3, 5:9] = bad, 0
    got, want = (preprocess(x, sample_rate_hz=100) for x in (broken, zeroed))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rate, to", [(500, 100), (100, 500), (360, 500), (512, 500), (257, 100)])
def test_resampling_keeps_a_slow_sine_its_offset_and_the_duration(rate, to):
    """A cosine, which is far from 0 at its ends: zeros beyond them would ring by up to 0.8."""

    def wave(r):
        return 0.7 + np.cos(2 * np.pi * 5 * np.arange(10 * r) / r)[None]

    got = resample(wave(rate), rate, to)
    np.testing.assert_allclose(got, wave(to), atol=0.05)
    inner = slice(to, 9 * to)
    np.testing.assert_allclose(got[:, inner], wave(to)[:, inner], atol=0.01)


@pytest.mark.parametrize("rate, to", [(100, 500), (360, 500), (512, 100), (500, 100)])
def test_resampling_keeps_a_flat_lead_flat_and_forgets_no_offset(ecg, rate, to):
    """Else the z-score makes an ECG of the ripple that a filter leaves on a constant."""
    assert (resample(np.full((1, 10 * rate), 0.3), rate, to) == 0.3).all()
    ecg = ecg.astype(np.float64)
    shifted = resample(ecg + 300, rate, to) - 300
    np.testing.assert_allclose(shifted, resample(ecg, rate, to), atol=1e-9)


def test_resampling_removes_what_would_fold():
    wave = np.sin(2 * np.pi * 90 * np.arange(5000) / 500)[None]  # 90 Hz would fold to 10 Hz
    assert np.abs(resample(wave, 500, 100)[:, 50:-50]).max() < 0.05


def test_zscore_is_over_the_whole_view_and_before_the_padding(ecg):
    got = preprocess(ecg, sample_rate_hz=100)
    assert abs(got.mean()) < 1e-6 and abs(got.std() - 1) < 1e-5
    assert not np.allclose(got.std(axis=1), 1, atol=0.05)  # leads keep their ratio
    short = preprocess(ecg[:, :400], sample_rate_hz=100)
    assert short.shape == (12, 1000) and not short[:, 400:].any()
    assert abs(short[:, :400].std() - 1) < 1e-5


def test_length_is_cut_to_the_first_ten_seconds_and_short_ones_are_refused(ecg):
    long = np.concatenate([ecg, ecg[:, ::-1]], axis=1)
    got, want = (preprocess(x, sample_rate_hz=100) for x in (long, ecg))
    np.testing.assert_array_equal(got, want)
    assert preprocess(ecg[:, :250], sample_rate_hz=100).shape == (12, 1000)
    with pytest.raises(selfmis.RecordError, match="2.49 s"):
        preprocess(ecg[:, :249], sample_rate_hz=100)


def test_normalize_none_is_millivolts(ecg):
    np.testing.assert_array_equal(preprocess(ecg, sample_rate_hz=100, normalize="none"), ecg)


def test_ecgfounder_filter_removes_wander_and_mains_but_keeps_the_beat():
    t = np.arange(5000) / 500
    beat = synthesize(1, 7, noise=0)[0][0, :1]
    dirty = beat + np.sin(2 * np.pi * 0.1 * t) + 0.3 * np.sin(2 * np.pi * 50 * t) + 2
    clean = preprocess(beat, normalize="none", filter="ecgfounder")
    from_dirty = preprocess(dirty, normalize="none", filter="ecgfounder")
    inner = slice(500, 4500)
    assert np.abs(from_dirty[:, inner] - clean[:, inner]).max() < 0.1
    assert np.corrcoef(clean[0], beat[0])[0, 1] > 0.85


@pytest.mark.parametrize(
    "frequency_hz, gain",
    [
        (0.5, 0.002),
        (1, 0.120),
        (2, 0.639),
        (10, 1.000),
        (30, 0.922),
        (40, 0.497),
        (45, 0.259),
        (50, 0.000),
        (60, 0.028),
    ],
)
def test_ecgfounder_filter_has_the_gains_of_its_three_parts(frequency_hz, gain):
    """Notch and band-pass, both squared, decide from 10 Hz on; below it the median baseline."""
    wave = np.sin(2 * np.pi * frequency_hz * np.arange(30_000) / 500)[None]
    inner = slice(5000, 25_000)
    filtered = selfmis.ecgfounder_filter(wave, 500)
    assert filtered[:, inner].std() / wave[:, inner].std() == pytest.approx(gain, abs=0.005)


@pytest.mark.parametrize("settings", [dict(normalize="minmax"), dict(filter="wavelet")])
def test_unknown_settings_are_refused(ecg, settings):
    with pytest.raises(UsageError, match="minmax|wavelet"):
        preprocess(ecg, sample_rate_hz=100, **settings)


# --------------------------------------------------------------------------------------------------
# Pairs
# --------------------------------------------------------------------------------------------------


def test_self_cut_is_the_named_lead_and_nothing_else(ecg):
    for kind in (ecg, torch.from_numpy(ecg), torch.from_numpy(ecg)[None]):
        single, multi = self_cut(kind, "v2")
        assert multi is kind and single.shape[-2:] == (1, 1000)
        np.testing.assert_array_equal(np.asarray(single).reshape(-1), ecg[7])
    with pytest.raises(UsageError, match=r"\(11, 1000\)"):
        self_cut(ecg[:11])
    with pytest.raises(UsageError, match="V7"):
        self_cut(ecg, "V7")


def test_each_view_is_preprocessed_on_its_own(ecg):
    single, multi = SelfCuttingDataset(ecg[None], "II", leads=LEADS, sample_rate_hz=100)[0]
    np.testing.assert_array_equal(single.numpy(), preprocess(ecg[1:2], sample_rate_hz=100))
    np.testing.assert_array_equal(multi.numpy(), preprocess(ecg, sample_rate_hz=100))
    assert not torch.equal(single, multi[1:2])


def test_arrays_need_named_rows_and_may_come_in_any_order(ecg):
    for array, names, message in (
        (ecg[None], None, r"\(1, 12, 1000\) and 0 names.*leads="),
        (ecg, LEADS, r"\(12, 1000\).*expected \(records, leads, samples\)"),
        (ecg.T[None], LEADS, r"\(1, 1000, 12\)"),
    ):
        with pytest.raises(UsageError, match=message):
            SelfCuttingDataset(array, leads=names)
    order = [LEADS.index(name) for name in MIMIC_ORDER]
    one = SelfCuttingDataset(ecg[None], leads=LEADS, sample_rate_hz=100)[0]
    other = SelfCuttingDataset(ecg[order][None], leads=MIMIC_ORDER, sample_rate_hz=100)[0]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_pairs_do_not_depend_on_worker_processes(ptbxl):
    dataset = SelfCuttingDataset(find_ptbxl(ptbxl), sample_rate_hz=100)
    both = [DataLoader(dataset, 16, num_workers=workers) for workers in (0, 2)]
    zero, two = (torch.cat([single for single, _ in loader]) for loader in both)
    assert torch.equal(zero, two)


# --------------------------------------------------------------------------------------------------
# Lists of records
# --------------------------------------------------------------------------------------------------


def find_ptbxl(root):
    return find_records(str(root), sample_rate_hz=100)


def test_the_three_layouts_and_a_list_of_paths_give_the_same_pairs(tmp_path, ptbxl, mimic):
    assert len(find_ptbxl(ptbxl)) == 80
    records = find_records(str(mimic), sample_rate_hz=100)
    assert records.collections[0].kind == "mimic-iv-ecg" and len(records) == 48
    assert len(np.unique(records.patients)) == 24 and not records.folds.any()
    want, _ = made_up(48, seed=5)
    np.testing.assert_allclose(records.read(7, LEADS, 100), want[7], atol=0.006)  # 5 uV steps
    (tmp_path / "somebody/else").mkdir(parents=True)
    shutil.copytree(mimic / "files", tmp_path / "somebody/else/files")
    folder = find_records(str(tmp_path / "somebody"), sample_rate_hz=100)  # any folder, recursive
    assert folder.collections[0].kind == "wfdb" and len(folder) == 48
    paths = [records.name(i) for i in range(3)]
    for i in range(3):
        one = SelfCuttingDataset(records, sample_rate_hz=100)[i]
        other = SelfCuttingDataset(paths, sample_rate_hz=100)[i]
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_ptbxl_labels_count_at_any_likelihood_and_rhythm_codes_do_not(ptbxl):
    records = find_ptbxl(ptbxl)
    assert records.labels.shape == (80, 44) and (records.labels.sum(1) == 1).all()
    assert records.labels[:, selfmis.STATEMENTS.index("IMI")].sum() == 10
    assert (np.bincount(records.folds)[1:] == 8).all()
    assert records.name(0) == f"{ptbxl}/records100/00000/00000_lr"
    at_500 = find_records(str(ptbxl), sample_rate_hz=500)
    assert at_500.name(0) == f"{ptbxl}/records500/00000/00000_hr"


def test_collections_can_be_mixed(ptbxl, mimic):
    both = find_ptbxl(ptbxl) + find_records(str(mimic), sample_rate_hz=100)
    assert len(both) == 128 and both.labels[:80].any(1).all() and not both.labels[80:].any()
    assert both[np.arange(80, 128)].name(0) == find_records(str(mimic)).name(0)
    one = find_records("synthetic:20", sample_rate_hz=100)
    assert one.read(13, ("I",), 100).shape == (1, 1000)
    want = synthesize(1, 0, first=13, sample_rate_hz=100)[0][0]
    np.testing.assert_array_equal(one.read(13, LEADS, 100), want)
    assert (one.labels.sum(1) >= 1).all() and one.folds.tolist() == [i % 10 + 1 for i in range(20)]


def test_synthetic_records_beside_real_ones_only_train(ptbxl):
    config = SimpleNamespace(data=[str(ptbxl), "synthetic:30"], limit=None)
    both = selfmis.gather_records(config, 100, 7)
    kind, root, paths = both.collections[1]
    assert (kind, root, len(paths)) == ("synthetic", "7", 30) and set(both.folds[80:]) == {11}
    assert len(np.unique(both.patient_keys())) == 110
    config.data = ["synthetic:30"]
    assert set(selfmis.gather_records(config, 100, 7).folds) == set(range(1, 11))


HEAD = "ecg_id,patient_id,scp_codes,strat_fold,filename_lr,filename_hr\n"
GOOD = "1,7.0,\"{'IMI': 100.0}\",3,records100/a_lr,records500/a_hr\n"


def other_record(name):
    """A row like GOOD of another record."""
    return GOOD.replace("a_", f"{name}_")


def read_tables(folder, ptbxl_table: str | bytes = "", mimic_table: str | bytes = ""):
    """The records of a folder with one of the two tables in it."""
    for name, text in (("ptbxl_database.csv", ptbxl_table), ("record_list.csv", mimic_table)):
        if text:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return find_records(str(folder), sample_rate_hz=500)


@pytest.mark.parametrize(
    "old, new",
    [
        ("", ""),
        (",3,", ",3.0,"),
        ("7.0", "7"),
        ("ecg_id", "\ufeffecg_id"),
        ("\n", "\r\n"),
        ("a_hr", "a_hr.hea"),
        ("\n", ",,\n"),  # empty columns of a spreadsheet
        ("a_hr\n", "a_hr,\n"),  # a comma more than in the header must shift no column
        ("7.0", " 7 "),
    ],
)
def test_tables_that_spreadsheets_wrote_are_read(tmp_path, old, new):
    records = read_tables(tmp_path, (HEAD + GOOD).replace(old, new))
    assert (records.folds.tolist(), records.patients.tolist()) == ([3], [7])
    assert records.name(0) == f"{tmp_path}/records500/a_hr"
    assert records.labels.sum() == records.labels[0, selfmis.STATEMENTS.index("IMI")] == 1


def test_empty_patients_are_each_their_own(tmp_path):
    unknown = [other_record(name).replace("7.0", "") for name in "bc"]
    records = read_tables(tmp_path, HEAD + GOOD + "".join(unknown))
    assert records.patients[0] == 7 and len(set(records.patients)) == 3
    assert (records.patients[1:] < 0).all()
    (tmp_path / "ptbxl_database.csv").unlink()
    mimic_table = "\ufeffsubject_id,path\n10000001.0,files/a\n,files/b\n,files/c\n"
    records = read_tables(tmp_path, mimic_table=mimic_table)
    assert records.patients.tolist()[0] == 10000001 and len(set(records.patients)) == 3


CODES = "{'IMI': 100.0}"


@pytest.mark.parametrize(
    "old, new, message",
    [
        (",3,", ",x,", ", row 2: strat_fold is 'x', not a whole number"),
        (",3,", ",3.5,", ", row 2: strat_fold is '3.5', not a whole number"),
        (",3,", ",,", ", row 2: strat_fold is"),
        (",3,", ",inf,", ", row 2: strat_fold is 'inf'"),
        (",3,", ",0,", ", row 2: strat_fold is"),
        (",3,", ",11,", ", row 2: strat_fold is"),
        (",3,", ",259,", ", row 2: strat_fold is"),  # read as 3: eight bits
        ("7.0", "P7", ", row 2: patient_id is 'P7', not a whole number"),
        ("7.0", "1e300", ", row 2: patient_id is '1e300'"),
        (CODES, "", ", row 2: scp_codes is"),
        (CODES, CODES[:-1], ", row 2: scp_codes is .*, not a dict"),
        (CODES, "IMI", ", row 2: scp_codes is 'IMI', not a dict"),
        (CODES, "5", ", row 2: scp_codes is '5', not a dict"),
        (CODES, "['IMI']", ", row 2: scp_codes is .*, not a dict"),
        (CODES, "{[]: 1}", ", row 2: scp_codes is .*, not a dict"),
        (CODES, "(" * 99, ", row 2: scp_codes is .*, not a dict"),
        (f'"{CODES}"', "{'IMI': 9, 'SR': 0}", ", row 2: scp_codes"),  # not quoted: two columns
        ("records500/a_hr", "", ", row 2: filename_hr is empty"),
        ("records500/a_hr", "/etc/a", ", row 2: /etc/a lies outside"),
        ("records500/a_hr", "records500/../../a", ", row 2: .* lies outside"),
        (GOOD, other_record("b"), ", row 2: records500/b_hr is listed before, in row 1"),
        (GOOD, "1,7.0\n", ", row 2: "),
        (GOOD, '1,7.0,"{', ": cannot be read .*row 2"),
    ],
)
def test_a_damaged_row_is_one_sentence_with_file_and_row(tmp_path, old, new, message):
    with pytest.raises(UsageError, match="ptbxl_database.csv" + message) as error:
        read_tables(tmp_path, HEAD + other_record("b") + GOOD.replace(old, new))
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "row, message",
    [
        ("10000001,../a", "row 2: ../a lies outside the collection's folder"),
        ("10000001,/files/a", "row 2: /files/a lies outside"),
        ("10000001,", "row 2: path is empty"),
        ("p10000001,files/a", "row 2: subject_id is 'p10000001', not a whole number"),
    ],
)
def test_a_damaged_row_of_mimic_s_list_too(tmp_path, row, message):
    with pytest.raises(UsageError, match=f"record_list.csv, {message}"):
        read_tables(tmp_path, mimic_table=f"subject_id,path\n10000001,files/b\n{row}\n")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a,b\n1,2\n", "cannot be read .*path.*subject_id|cannot be read .*subject_id.*path"),
        (b"path;subject_id\nfiles/a;1\n", "cannot be read"),
        (b"path,subject_id\n", "lists no record"),
        (b"\n", "cannot be read"),
        (b"\xff\xfep\x00a\x00t\x00h\x00", "cannot be read"),  # UTF-16
        (b"path,subject_id\nfiles/\xe4,1\n", "cannot be read"),  # Latin-1
        (b"\x89PNG\r\n\x1a\n\x00\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_such_table_is_one_sentence(tmp_path, content, message):
    with pytest.raises(UsageError, match=f"record_list.csv: {message}") as error:
        read_tables(tmp_path, mimic_table=content)
    assert len(str(error.value).splitlines()) == 1


# --------------------------------------------------------------------------------------------------
# The pass: what training reads
# --------------------------------------------------------------------------------------------------

SPEC = selfmis.InputSpec("I", 100, {"normalize": "zscore", "filter": "none"})
ALONE = selfmis.Ranks(0, 1, 1, torch.device("cpu"))


def read(cache, records, rows=None, *, spec=SPEC, teacher=None, strict=False):
    """`read_pairs` by one process, of all records unless rows are given."""
    config = SimpleNamespace(cache=str(cache), out="unused/run", workers=0, strict=strict)
    if rows is None:
        rows = np.arange(len(records))
    return read_pairs(config, records, np.asarray(rows), spec, ALONE, teacher)


def everything(pairs):
    """Signals and embeddings of all usable rows."""
    (both,) = pairs.batches([pairs.usable])
    return both


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return selfmis.ResNet1D(12, **TINY).eval()


def test_reading_leaves_the_stream_of_random_numbers_alone(tmp_path, ptbxl):
    """The weights that are drawn next do not depend on what was in the cache."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    read(tmp_path / "cache", find_records(str(ptbxl), sample_rate_hz=100))
    assert torch.equal(torch.rand(2), expected)


@pytest.fixture
def reads(monkeypatch):
    """Names of the records that are read from now on."""
    names = []
    real = selfmis.Records.read

    def spy(self, i, *arguments):
        names.append(self.name(i))
        return real(self, i, *arguments)

    monkeypatch.setattr(selfmis.Records, "read", spy)
    return names


def some(records, n):
    """n of them, from all over the list."""
    return records[np.sort(np.random.default_rng(0).permutation(len(records))[:n])]


def mixed(ptbxl, mimic):
    """40 records of each."""
    return some(find_ptbxl(ptbxl), 40) + some(find_records(str(mimic), sample_rate_hz=100), 40)


def test_cached_pairs_are_bit_for_bit_those_read_on_the_fly(tmp_path, ptbxl, mimic, teacher):
    """Of two collections, whose rows a batch mixes."""
    records = mixed(ptbxl, mimic)
    rows = np.array_split(np.random.default_rng(0).permutation(80), 7)
    cached = read(tmp_path, records, teacher=teacher)
    direct = read("none", records, teacher=teacher)
    assert direct.signals == [] and len(cached.usable) == len(direct.usable) == 80
    assert len(cached.signals) == len(cached.targets) == 2
    for (a, m), (b, n) in zip(cached.batches(rows), direct.batches(rows), strict=True):
        assert torch.equal(a, b) and torch.equal(m, n)
    for row in (5, 70):
        multi = SelfCuttingDataset(records, sample_rate_hz=100)[row][1][None]
        with torch.no_grad():
            want = teacher(multi)
        torch.testing.assert_close(everything(cached)[1][row], want[0], rtol=2e-3, atol=1e-3)


def test_a_cache_is_reused_shared_and_never_stale(tmp_path, ptbxl, teacher, reads):
    records = some(find_ptbxl(ptbxl), 16)
    torch.manual_seed(1)
    other = selfmis.ResNet1D(12, **TINY).eval()
    raw = SPEC._replace(preprocessing={"normalize": "none", "filter": "none"})

    def number_read(**changed):
        reads.clear()
        read(tmp_path, records, **dict(teacher=teacher) | changed)
        return len(reads), len(list(tmp_path.glob("*.f16")))

    assert number_read() == (16, 2)
    assert number_read() == (0, 2)  # all there
    assert number_read(teacher=None) == (0, 2)  # signals alone are shared
    assert number_read(teacher=other) == (16, 3)  # embeddings anew, signals kept
    assert number_read(spec=SPEC._replace(lead="II")) == (16, 4)  # and the other way round
    assert number_read(spec=raw) == (16, 6)
    assert number_read(spec=SPEC._replace(sample_rate_hz=50)) == (16, 8)


def test_two_runs_that_begin_one_cache_at_once_empty_nothing(tmp_path, monkeypatch):
    mine, theirs = (selfmis.CachedArray(tmp_path, "signals", ["key"], (4, 2)) for _ in range(2))
    theirs.create()
    theirs.write(np.array([1]), np.ones((1, 2)))
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as a moment before
    mine.create()
    np.testing.assert_array_equal(mine.read(np.array([0, 1])), [[0, 0], [1, 1]])


def test_other_rows_of_a_collection_share_its_cache(tmp_path, ptbxl, mimic, teacher, reads):
    records = mixed(ptbxl, mimic)
    few = np.random.default_rng(0).permutation(80)[:30]
    first = read(tmp_path, records, few, teacher=teacher)
    assert len(reads) == 30
    for subset, rows in (
        (records, few[:20]),
        (records[few], None),  # as labelled_records leaves some out
        (records[np.sort(few)], np.arange(7)),
        (some(find_ptbxl(ptbxl), 40), few[few < 40]),
    ):
        reads.clear()
        read(tmp_path, subset, rows, teacher=teacher)
        assert reads == []
    whole = read(tmp_path, records, teacher=teacher)
    assert len(reads) == 50 and not {records.name(i) for i in few} & set(reads)
    for a, b in zip(first.batches([few]), whole.batches([few]), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert len(list(tmp_path.glob("*.f16"))) == 4


def test_other_folds_limits_and_validation_records_read_nothing_again(
    tmp_path, ptbxl, mimic, tiny, reads
):
    def number_read(**changed):
        reads.clear()
        settings = dict(data=[str(ptbxl), str(mimic)], single=tiny[1], multi=tiny[12], lr=0.01)
        settings |= dict(batch_size=8, epochs=1, workers=0, out=str(tmp_path / "out"))
        pretrain(PretrainConfig(overwrite=True, **settings | changed))
        return len(reads)

    assert number_read() == 72 + 48  # the test fold is not read
    assert number_read(val_fold=3) == 0
    assert number_read(val_records=1) == 0
    assert number_read(limit=40) == 0
    assert number_read(data=[str(mimic)]) == 0
    assert number_read(test_fold=4) == 8  # fold 10


@pytest.mark.parametrize("name", ["signals", "targets"])
@pytest.mark.parametrize("damage", ["cut", "cut within a number", "deleted", "emptied"])
def test_a_row_whose_mark_got_lost_is_read_again_and_never_left_out(
    tmp_path, ptbxl, teacher, reads, name, damage
):
    records, rows = some(find_ptbxl(ptbxl), 16), np.arange(12)
    whole = read(tmp_path, records, rows, teacher=teacher)
    read(tmp_path, records, teacher=teacher)  # the other four, in a list of their own
    first = max(tmp_path.glob(f"{name}-*.rows"), key=os.path.getsize)
    reads.clear()
    if damage == "deleted":
        first.unlink()
    else:
        os.truncate(first, {"cut": 8 * 8, "cut within a number": 8 * 8 + 3, "emptied": 0}[damage])
    again = read(tmp_path, records, teacher=teacher)
    assert len(reads) == (4 if "cut" in damage else 12)
    assert again.usable.tolist() == list(range(16)) and again.unusable == []
    for a, b in zip(whole.batches([rows]), again.batches([rows]), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    reads.clear()
    read(tmp_path, records, teacher=teacher)
    assert reads == []


@pytest.mark.parametrize("name", ["signals", "targets"])
def test_an_array_that_was_deleted_takes_its_marks_along(tmp_path, ptbxl, teacher, name):
    records = some(find_ptbxl(ptbxl), 16)
    want = everything(read(tmp_path, records, teacher=teacher))
    for path in tmp_path.glob(f"{name}-*.f16"):
        path.unlink()
    read(tmp_path, records, np.arange(10), teacher=teacher)  # another --limit, or a kill
    got = everything(read(tmp_path, records, teacher=teacher))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_a_killed_pass_goes_on_where_it_was(tmp_path, ptbxl, monkeypatch):
    records, reads = find_ptbxl(ptbxl), []
    whole = read(tmp_path / "a", records)
    real = selfmis.Records.read

    def stop_at_70(self, i, *arguments):
        reads.append(i)
        if len(reads) == 70:
            raise KeyboardInterrupt
        return real(self, i, *arguments)

    monkeypatch.setattr(selfmis.Records, "read", stop_at_70)
    monkeypatch.setattr(selfmis, "READ_BATCH", 64)
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path / "b", records)
    again = read(tmp_path / "b", records)
    assert len(reads) == 70 + 80 - 64  # one batch of 64 was written
    assert torch.equal(everything(whole)[0], everything(again)[0])


def test_unusable_records_are_left_out_named_once_and_tried_again(tmp_path, capsys):
    x, _ = made_up(6)
    x[2, 0] = np.nan  # no valid sample in lead I
    x[3, 0] = 0.5  # flat lead I
    for i in range(6):
        ecg = x[i, :, :200] if i == 4 else x[i]  # r4 is too short
        write_record(tmp_path / f"data/r{i}", ecg)
    os.truncate(tmp_path / "data/r5.dat", 100)
    records = find_records(str(tmp_path / "data"))
    pairs = read(tmp_path / "cache", records)
    assert pairs.usable.tolist() == [0, 1] and len(pairs.unusable) == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if "cannot be used" in line]
    assert len(lines) == 1 and "4 of 6" in lines[0] and "r2" in lines[0] and "flat" in lines[0]
    write_record(tmp_path / "data/r5", x[5])
    assert read(tmp_path / "cache", records).usable.tolist() == [0, 1, 5]
    with pytest.raises(selfmis.RecordError, match="strict.*r2"):
        read("none", records, strict=True)
    with pytest.raises(UsageError, match="2 of 2 records.*none is left.*r2"):
        read("none", records, [2, 3])


class FullDisk(io.FileIO):
    """A file on a disk that has room for so many more writes."""

    room = 0

    def write(self, data):
        if FullDisk.room == 0:
            raise OSError(28, "No space left on device")
        FullDisk.room -= 1
        return super().write(data)


@pytest.mark.parametrize("room", [0, 5, 12])
def test_a_full_disk_is_one_sentence_and_what_is_cached_stays(tmp_path, ptbxl, monkeypatch, room):
    """At the first row, amid the rows, and at their marks."""
    records = some(find_ptbxl(ptbxl), 16)
    read(tmp_path, records, np.arange(4))
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}

    def full(path, mode):
        file = FullDisk(path, mode)
        return io.BufferedRandom(file, 1) if "+" in mode else file

    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(selfmis, "open", full, raising=False)
    message = r"f16: the cache cannot be written \(No space left on device\): free space, or give"
    with pytest.raises(UsageError, match=f"{message} another --cache"):
        read(tmp_path, records)
    monkeypatch.undo()
    assert all((tmp_path / name).stat().st_size >= size for name, size in before.items())
    direct = read("none", records)
    assert torch.equal(everything(read(tmp_path, records))[0], everything(direct)[0])


def test_the_cache_s_version_goes_with_what_is_cached(tmp_path):
    """Weighted sums: if one changes, older caches hold other records under the same name."""
    x, _ = synthesize(17, 0, types=SYNTHETIC_TYPES, sample_rate_hz=100)
    write_record(tmp_path / "r", x[0])
    x = resample(x, 100, 125)
    found = [selfmis.CACHE_VERSION]
    for records, settings in (
        (x, dict()),
        (x, dict(filter="ecgfounder")),
        (x, dict(normalize="none")),
        (read_ecg(tmp_path / "r", sample_rate_hz=125)[None], dict()),
    ):
        views = np.stack([preprocess(one, sample_rate_hz=125, **settings) for one in records])
        weights = np.random.default_rng(0).standard_normal(views.shape)
        found.append((views * weights).sum())
    expected = [6, 327.3806, 336.3360, -5.4844, 145.8068]
    assert found == pytest.approx(expected, abs=0.01), "raise CACHE_VERSION and renew this"


# --------------------------------------------------------------------------------------------------
# Real PTB-XL, where there is one
# --------------------------------------------------------------------------------------------------

ROOT = os.environ.get("SELFMIS_PTBXL")


@pytest.mark.skipif(not ROOT, reason="SELFMIS_PTBXL names no PTB-XL root")
def test_real_ptbxl_reads_as_its_protocol_says():
    with open(Path(ROOT) / "scp_statements.csv", newline="") as file:
        rows = list(csv.reader(file))
    diagnostic = rows[0].index("diagnostic")
    statements = sorted(row[0] for row in rows[1:] if row[diagnostic] == "1.0")
    assert tuple(statements) == selfmis.STATEMENTS
    records = find_ptbxl(ROOT)
    ecg = records.read(0, LEADS, 100)
    assert ecg.shape == (12, 1000) and 0.05 < ecg.std() < 1  # mV, not uV
    np.testing.assert_allclose(ecg[2], ecg[1] - ecg[0], atol=0.005)  # Einthoven: III = II - I
    np.testing.assert_allclose(ecg[4], ecg[0] - ecg[1] / 2, atol=0.005)  # aVL, by name
    if len(records) > 19_000:  # the excerpt with folds 1-9 complete
        kept = records.labels.any(1)
        k = [selfmis.STATEMENTS.index(t) for t in selfmis.MI_TYPES]
        train = records.labels[kept & (records.folds < 9)]
        val = records.labels[kept & (records.folds == 9)]
        assert (len(train), len(val)) == (17084, 2146)
        assert train[:, k].sum(0).tolist() == [232, 282, 1887, 383, 2143, 41, 26, 161, 13]
        assert val[:, k].sum(0).tolist() == [29, 36, 236, 47, 266, 5, 4, 20, 2]
