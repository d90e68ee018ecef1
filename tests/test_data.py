"""Signals, record lists, pairs and the pass over the records."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MIMIC_ORDER, PTBXL_NAMES, TINY, made_up, write_record
from torch.utils.data import DataLoader

import selfmis
from selfmis import LEADS, SelfCuttingDataset, find_records, preprocess, read_ecg, read_pairs, resample, self_cut


@pytest.fixture(scope="module")
def ecg():
    return made_up(1, seed=3)[0][0]  # (12, 1000) mV


@pytest.mark.parametrize("names, unit, adu", [(LEADS, "mV", 1000), (PTBXL_NAMES, "uV", 1), (MIMIC_ORDER, "mV", 1000), (LEADS[::-1], "V", 1e6)])
def test_leads_are_found_by_name_and_units_become_millivolts(tmp_path, ecg, names, unit, adu):
    upper = [name.upper() for name in LEADS]
    write_record(tmp_path / "r", ecg[[upper.index(name.upper()) for name in names]], names, unit=unit, adu=adu)
    got = read_ecg(tmp_path / "r.hea", sample_rate_hz=100)
    assert got.dtype == np.float32 and got.shape == ecg.shape
    np.testing.assert_allclose(got, ecg, atol=1.01e-3)
    np.testing.assert_array_equal(read_ecg(tmp_path / "r", ["avl", "I"], 100), got[[4, 0]])
    np.testing.assert_array_equal(read_ecg(tmp_path / "r", "II", 100), got[1:2])  # a name, not two leads I
    np.testing.assert_array_equal(selfmis.synthesize(1, 3, leads="II", sample_rate_hz=100)[0][0], ecg[1:2])


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
    np.testing.assert_array_equal(preprocess(broken, sample_rate_hz=100), preprocess(zeroed, sample_rate_hz=100))


@pytest.mark.parametrize("rate, to", [(500, 100), (100, 500), (360, 500), (512, 500), (257, 100)])
def test_resampling_keeps_a_slow_sine_its_offset_and_the_duration(rate, to):
    wave = lambda r: 0.7 + np.sin(2 * np.pi * 5 * np.arange(round(10 * r)) / r)[None]
    got = resample(wave(rate), rate, to)
    assert abs(got.shape[1] - 10 * to) <= 1
    inner = slice(to, 9 * to)
    np.testing.assert_allclose(got[:, inner], wave(to)[:, inner], atol=0.01)
    assert np.abs(got - 0.7).max() < 1.2  # the ends do not ring


@pytest.mark.parametrize("rate, to", [(100, 500), (360, 500), (512, 100), (500, 100)])
def test_resampling_keeps_a_flat_lead_flat_and_forgets_no_offset(ecg, rate, to):
    """Else the z-score makes an ECG of the ripple that a filter leaves on a constant."""
    assert (resample(np.full((1, 10 * rate), 0.3), rate, to) == 0.3).all()
    ecg = ecg.astype(np.float64)
    np.testing.assert_allclose(resample(ecg + 300, rate, to) - 300, resample(ecg, rate, to), atol=1e-9)


def test_resampling_removes_what_would_fold():
    wave = np.sin(2 * np.pi * 90 * np.arange(5000) / 500)[None]  # 90 Hz would appear at 10 Hz in 100 Hz
    assert np.abs(resample(wave, 500, 100)[:, 50:-50]).max() < 0.05


def test_zscore_is_over_the_whole_view_and_before_the_padding(ecg):
    got = preprocess(ecg, sample_rate_hz=100)
    assert abs(got.mean()) < 1e-6 and abs(got.std() - 1) < 1e-5
    assert not np.allclose(got.std(axis=1), 1, atol=0.05)  # leads keep their ratio
    short = preprocess(ecg[:, :400], sample_rate_hz=100)
    assert short.shape == (12, 1000) and not short[:, 400:].any() and abs(short[:, :400].std() - 1) < 1e-5


def test_length_is_cut_to_the_first_ten_seconds_and_short_ones_are_refused(ecg):
    long = np.concatenate([ecg, ecg[:, ::-1]], axis=1)
    np.testing.assert_array_equal(preprocess(long, sample_rate_hz=100), preprocess(ecg, sample_rate_hz=100))
    assert preprocess(ecg[:, :250], sample_rate_hz=100).shape == (12, 1000)
    with pytest.raises(ValueError, match="2.49 s"):
        preprocess(ecg[:, :249], sample_rate_hz=100)


def test_normalize_none_is_millivolts(ecg):
    np.testing.assert_array_equal(preprocess(ecg, sample_rate_hz=100, normalize="none"), ecg)


def test_ecgfounder_filter_removes_wander_and_mains_but_keeps_the_beat():
    t = np.arange(5000) / 500
    beat = selfmis.synthesize(1, 7, noise=0)[0][0, :1]
    dirty = beat + np.sin(2 * np.pi * 0.1 * t) + 0.3 * np.sin(2 * np.pi * 50 * t) + 2
    clean, from_dirty = (preprocess(x, normalize="none", filter="ecgfounder") for x in (beat, dirty))
    inner = slice(500, 4500)
    assert np.abs(from_dirty[:, inner] - clean[:, inner]).max() < 0.1
    assert np.corrcoef(clean[0], beat[0])[0, 1] > 0.85


def test_unknown_settings_are_refused(ecg):
    for settings in (dict(normalize="minmax"), dict(filter="wavelet")):
        with pytest.raises(ValueError, match="minmax|wavelet"):
            preprocess(ecg, sample_rate_hz=100, **settings)


def test_self_cut_is_the_named_lead_and_nothing_else(ecg):
    for kind in (ecg, torch.from_numpy(ecg), torch.from_numpy(ecg)[None]):
        single, multi = self_cut(kind, "v2")
        assert multi is kind and single.shape[-2:] == (1, 1000)
        np.testing.assert_array_equal(np.asarray(single).reshape(-1), ecg[7])
    with pytest.raises(ValueError, match="11 leads"):
        self_cut(ecg[:11])
    with pytest.raises(ValueError, match="V7"):
        self_cut(ecg, "V7")


def test_each_view_is_preprocessed_on_its_own(ecg):
    single, multi = SelfCuttingDataset(ecg[None], "II", leads=LEADS, sample_rate_hz=100)[0]
    np.testing.assert_array_equal(single.numpy(), preprocess(ecg[1:2], sample_rate_hz=100))
    np.testing.assert_array_equal(multi.numpy(), preprocess(ecg, sample_rate_hz=100))
    assert not torch.equal(single, multi[1:2])


def test_arrays_need_named_rows_and_may_come_in_any_order(ecg):
    for array, names, said in ((ecg[None], None, "0 names"), (ecg, LEADS, r"\(12, 1000\).*ecg\[None\]"), (ecg.T[None], LEADS, r"\(1, 1000, 12\)")):
        with pytest.raises(ValueError, match=f"{said}.*leads=" if names is None else said):
            SelfCuttingDataset(array, leads=names)
    order = [LEADS.index(name) for name in MIMIC_ORDER]
    one = SelfCuttingDataset(ecg[None], leads=LEADS, sample_rate_hz=100)[0]
    other = SelfCuttingDataset(ecg[order][None], leads=MIMIC_ORDER, sample_rate_hz=100)[0]
    assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_the_three_layouts_and_a_list_of_paths_give_the_same_pairs(tmp_path, ecg, ptbxl, mimic):
    assert len(find_records(str(ptbxl), sample_rate_hz=100)) == 80
    records = find_records(str(mimic), sample_rate_hz=100)
    assert records.sources[0][0] == "mimic-iv-ecg" and len(records) == 48
    assert len(np.unique(records.patients)) == 24
    want, _ = made_up(48, seed=5)
    np.testing.assert_allclose(records.read(7, LEADS, 100), want[7], atol=0.006)  # 5 uV steps
    (tmp_path / "somebody/else").mkdir(parents=True)
    shutil.copytree(mimic / "files", tmp_path / "somebody/else/files")
    folder = find_records(str(tmp_path / "somebody"), sample_rate_hz=100)  # any folder, recursive
    assert folder.sources[0][0] == "wfdb" and len(folder) == 48
    paths = [records.name(i) for i in range(3)]
    for i in range(3):
        a, b = SelfCuttingDataset(records, sample_rate_hz=100)[i], SelfCuttingDataset(paths, sample_rate_hz=100)[i]
        assert all(torch.equal(p, q) for p, q in zip(a, b))


def test_ptbxl_labels_count_at_any_likelihood_and_rhythm_codes_do_not(ptbxl):
    records = find_records(str(ptbxl), sample_rate_hz=100)
    assert records.labels.shape == (80, 44) and (records.labels.sum(1) == 1).all()
    assert records.labels[:, selfmis.STATEMENTS.index("IMI")].sum() == 10
    assert (np.bincount(records.folds)[1:] == 8).all()
    assert records.paths[0] == b"records100/00000/00000_lr"
    assert find_records(str(ptbxl), sample_rate_hz=500).paths[0] == b"records500/00000/00000_hr"


def test_collections_can_be_mixed(ptbxl, mimic):
    both = find_records(str(ptbxl), sample_rate_hz=100) + find_records(str(mimic), sample_rate_hz=100)
    assert len(both) == 128 and both.labels is None
    assert both[np.arange(80, 128)].name(0) == find_records(str(mimic)).name(0)
    one = find_records("synthetic:20", sample_rate_hz=100)
    assert one.read(13, ("I",), 100).shape == (1, 1000)
    np.testing.assert_array_equal(one.read(13, LEADS, 100), selfmis.synthesize(1, 0, first=13, sample_rate_hz=100)[0][0])
    assert (one.labels.sum(1) >= 1).all() and one.folds.tolist() == [i % 10 + 1 for i in range(20)]


def test_synthetic_records_beside_real_ones_only_train(ptbxl):
    config = type("C", (), dict(data=[str(ptbxl), "synthetic:30"], limit=None, val_fold=1, test_fold=2))
    both = selfmis.gather_records(config, 100, 7)
    assert both.sources[1] == ("synthetic", "7") and set(both.folds[80:].tolist()) == {11}
    assert len(np.unique(both.patient_keys())) == 110
    config.data = ["synthetic:30"]
    assert set(selfmis.gather_records(config, 100, 7).folds.tolist()) == set(range(1, 11))


def test_pairs_do_not_depend_on_worker_processes(ptbxl):
    dataset = SelfCuttingDataset(find_records(str(ptbxl), sample_rate_hz=100), sample_rate_hz=100)
    zero, two = (torch.cat([single for single, _ in DataLoader(dataset, 16, num_workers=w)]) for w in (0, 2))
    assert torch.equal(zero, two)


# --- the pass: what training reads ---


class Settings:
    def __init__(self, cache, **changed):
        self.cache, self.out, self.workers, self.strict = str(cache), "unused/run", 0, False
        self.__dict__ |= changed


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return selfmis.ResNet1D(12, **TINY).eval()


VIEW = selfmis.View("I", 100, {"normalize": "zscore", "filter": "none"})
ALONE = selfmis.Ranks(0, 1, 0, 1, torch.device("cpu"))


def test_cached_pairs_are_bit_for_bit_those_read_on_the_fly(tmp_path, ptbxl, teacher):
    records = find_records(str(ptbxl), sample_rate_hz=100)
    rows = np.array_split(np.random.default_rng(0).permutation(80), 7)
    cached = read_pairs(Settings(tmp_path), records, VIEW, ALONE, "x", teacher)
    direct = read_pairs(Settings("none"), records, VIEW, ALONE, "x", teacher)
    assert direct.signals is None and len(cached.usable) == len(direct.usable) == 80
    for (a, m), (b, n) in zip(cached.batches(rows), direct.batches(rows)):
        assert torch.equal(a, b) and torch.equal(m, n)
    with torch.no_grad():
        want = teacher(SelfCuttingDataset(records, sample_rate_hz=100)[5][1][None])
    torch.testing.assert_close(torch.from_numpy(cached.targets[5]).float(), want[0], rtol=2e-3, atol=1e-3)


def test_a_cache_is_reused_shared_and_never_stale(tmp_path, ptbxl, teacher, monkeypatch):
    records = find_records(str(ptbxl), sample_rate_hz=100)
    reads = []
    monkeypatch.setattr(selfmis.Records, "read", lambda self, i, *a, read=selfmis.Records.read: reads.append(i) or read(self, i, *a))
    files = lambda: len(list(Path(tmp_path).glob("*.npy")))

    def number_read(view=VIEW, teacher=teacher, records=records):
        reads.clear()
        read_pairs(Settings(tmp_path), records, view, ALONE, "x", teacher)
        return len(reads)

    assert number_read() == 80 and files() == 4
    assert number_read() == 0  # all there
    assert number_read(teacher=None) == 0  # signals alone are shared
    other = selfmis.ResNet1D(12, **TINY).eval()
    assert number_read(teacher=other) == 80 and files() == 6  # another teacher: embeddings anew, signals kept
    assert number_read(view=VIEW._replace(lead="II")) == 80 and files() == 8  # another lead: signals anew, embeddings kept
    assert number_read(view=VIEW._replace(preprocessing={"normalize": "none", "filter": "none"})) == 80
    assert number_read(records=records[np.arange(79)]) == 79


def test_the_cache_s_version_goes_with_what_is_cached():
    """A number of all types: if it changes, caches of before hold other records under the same name."""
    x, _ = selfmis.synthesize(17, 0, types=selfmis.SYNTHETIC_TYPES, sample_rate_hz=100)
    found = float(np.abs(np.stack([preprocess(one, sample_rate_hz=100) for one in resample(x, 100, 250)[..., ::2]])).sum())
    assert (selfmis.CACHE_VERSION, found) == (5, pytest.approx(104441, rel=1e-5)), "raise CACHE_VERSION and put the new number here"


def test_a_killed_pass_goes_on_where_it_was(tmp_path, ptbxl, monkeypatch):
    records, reads = find_records(str(ptbxl), sample_rate_hz=100), []
    whole = read_pairs(Settings(tmp_path / "a"), records, VIEW, ALONE, "x")

    def read(self, i, *a, real=selfmis.Records.read):
        reads.append(i)
        if len(reads) == 70:
            raise KeyboardInterrupt
        return real(self, i, *a)

    monkeypatch.setattr(selfmis.Records, "read", read)
    with pytest.raises(KeyboardInterrupt):
        read_pairs(Settings(tmp_path / "b"), records, VIEW, ALONE, "x")
    again = read_pairs(Settings(tmp_path / "b"), records, VIEW, ALONE, "x")
    assert len(reads) == 70 + 80 - 64  # one batch of 64 was written
    np.testing.assert_array_equal(whole.signals, again.signals)


def test_unusable_records_are_left_out_named_once_and_tried_again(tmp_path, capsys):
    x, _ = made_up(6)
    x[2, 0] = np.nan  # no valid sample in lead I
    x[3, 0] = 0.5  # flat lead I
    for i in range(6):
        write_record(tmp_path / f"data/r{i}", x[i, :, :200] if i == 4 else x[i])  # r4 is too short
    os.truncate(tmp_path / "data/r5.dat", 100)
    records = find_records(str(tmp_path / "data"))
    pairs = read_pairs(Settings(tmp_path / "cache"), records, VIEW, ALONE, "training")
    assert pairs.usable.tolist() == [0, 1]
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be used" in line]
    assert len(said) == 1 and "4 of 6" in said[0] and "r2" in said[0] and "flat" in said[0]
    write_record(tmp_path / "data/r5", x[5])
    assert read_pairs(Settings(tmp_path / "cache"), records, VIEW, ALONE, "training").usable.tolist() == [0, 1, 5]
    with pytest.raises(ValueError, match="strict.*r2"):
        read_pairs(Settings("none", strict=True), records, VIEW, ALONE, "training")
    with pytest.raises(ValueError, match="none of 2"):
        read_pairs(Settings("none"), records[np.array([2, 3])], VIEW, ALONE, "training")


def test_a_full_disk_is_an_error_before_and_while_caching(tmp_path, ptbxl, monkeypatch):
    records = find_records(str(ptbxl), sample_rate_hz=100)
    monkeypatch.setattr(selfmis.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="GiB are needed"):
        read_pairs(Settings(tmp_path), records, VIEW, ALONE, "x")
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ValueError, match="cache cannot be written .No space left on device.: free space, or give another --cache"):
        read_pairs(Settings(tmp_path), records, VIEW, ALONE, "x")
    monkeypatch.undo()
    monkeypatch.setattr(os, "pwrite", lambda file, data, at, real=os.pwrite: real(file, data[:700], at))  # nearly full: less than asked
    short = read_pairs(Settings(tmp_path / "short"), records[:3], VIEW, ALONE, "x")
    monkeypatch.undo()
    assert np.array_equal(short.signals, read_pairs(Settings(tmp_path / "whole"), records[:3], VIEW, ALONE, "x").signals)
    assert len(read_pairs(Settings(tmp_path), records, VIEW, ALONE, "x").usable) == 80


# --- real PTB-XL, where there is one ---

ROOT = os.environ.get("SELFMIS_PTBXL")


@pytest.mark.skipif(not ROOT, reason="SELFMIS_PTBXL names no PTB-XL root")
def test_real_ptbxl_reads_as_its_protocol_says():
    import csv

    with open(Path(ROOT) / "scp_statements.csv", newline="") as file:
        rows = list(csv.reader(file))
    diagnostic = rows[0].index("diagnostic")
    assert tuple(sorted(row[0] for row in rows[1:] if row[diagnostic] == "1.0")) == selfmis.STATEMENTS
    records = find_records(ROOT, sample_rate_hz=100)
    ecg = records.read(0, LEADS, 100)
    assert ecg.shape == (12, 1000) and 0.05 < ecg.std() < 1  # mV, not uV
    np.testing.assert_allclose(ecg[2], ecg[1] - ecg[0], atol=0.005)  # Einthoven: III = II - I
    np.testing.assert_allclose(ecg[4], ecg[0] - ecg[1] / 2, atol=0.005)  # aVL, by name
    if len(records) > 19_000:  # the excerpt with folds 1-9 complete
        kept, k = records.labels.any(1), [selfmis.STATEMENTS.index(t) for t in selfmis.MI_TYPES]
        train, val = (records.labels[kept & np.isin(records.folds, folds)] for folds in (range(1, 9), [9]))
        assert (len(train), len(val)) == (17084, 2146)
        assert train[:, k].sum(0).tolist() == [232, 282, 1887, 383, 2143, 41, 26, 161, 13]
        assert val[:, k].sum(0).tolist() == [29, 36, 236, 47, 266, 5, 4, 20, 2]
