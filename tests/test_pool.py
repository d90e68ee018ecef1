"""extras/pool.py: runs with different test folds as one table, and what it refuses to join."""

import functools
import io
import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch

import selfmis
from extras import pool
from selfmis import MI_TYPES, STATEMENTS, UsageError
from train_probe import NINE, ProbeConfig, infarct_score, main

IMI, NORM = STATEMENTS.index("IMI"), STATEMENTS.index("NORM")


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Intervals of 100 bootstrap draws will do: on eight records most draws are drawn again."""
    quick = functools.partial(selfmis.bootstrap_auc, draws=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfmis, "bootstrap_auc", quick)
        yield


@pytest.fixture(scope="module")
def folds(tmp_path_factory, ptbxl, tiny):
    """{fold: folder of a run that was tested on it}, for all ten."""
    root = tmp_path_factory.mktemp("folds")
    for fold in range(1, 11):
        settings = dict(val_fold=fold % 10 + 1, test_fold=fold, out=str(root / str(fold)))
        main(
            ProbeConfig([str(ptbxl)], encoder=tiny[1], head="adam", epochs=2, workers=0, **settings)
        )
    return {fold: root / str(fold) for fold in range(1, 11)}


@pytest.fixture
def copies(tmp_path, folds):
    """Copies of the runs of folds 1 and 2, to be changed."""
    for fold in (1, 2):
        shutil.copytree(folds[fold], tmp_path / f"run{fold}")
    return tmp_path / "run1", tmp_path / "run2"


def change_json(path, **config):
    content = json.loads(path.read_text())
    content["config"] |= config
    path.write_text(json.dumps(content))


def change_pt(path, **entries):
    torch.save(torch.load(path, weights_only=True) | entries, path)


def refused(folders, sentence, *flags):
    """The error of a call in this process; --debug shows it."""
    with pytest.raises(UsageError, match=sentence):
        pool.main([*map(str, folders), *flags, "--debug"])


def read(out):
    return json.loads((out / "results.json").read_text())


# ---- what it computes ----------------------------------------------------------------------------


def test_every_record_is_tested_once_by_a_head_that_never_saw_its_fold(tmp_path, folds, capsys):
    pool.main([*map(str, folds.values()), "--out", str(tmp_path / "all")])
    results, said = read(tmp_path / "all"), capsys.readouterr().out
    assert results["records"] == results["patients"] == 80
    assert results["folds"] == list(range(1, 11))
    assert results["pooled"] == [str(folder) for folder in folds.values()]
    assert set(results) >= {"nine", "six", "diagnostic", "types", "any", "heads", "config"}
    # Every type but IPLMI and IPMI has a record in each of ten folds: enough for an interval.
    for name in MI_TYPES:
        entry = results["types"][name]
        n = 0 if name in ("IPLMI", "IPMI") else 10
        assert entry["positives"] == n and (entry["low"] is not None) == (n > 0)
    assert results["any"]["NORM"]["positives"] == 70 and results["any"]["NORM"]["negatives"] == 10
    assert set(path.name for path in (tmp_path / "all").iterdir()) == {"results.json", "results.md"}
    text = (tmp_path / "all/results.md").read_text()
    assert said == text and "80 records of 80 patients" in text and "| any MI vs. NORM" in text


def test_numbers_by_hand(tmp_path, folds):
    """Percentiles within the fold by counting, their AUC by counting pairs."""
    pool.main([str(folds[fold]) for fold in (3, 7)] + ["--out", str(tmp_path / "two")])
    results = read(tmp_path / "two")
    percentiles, any_percentiles, labels = [], [], []
    for fold in (3, 7):
        saved = np.load(folds[fold] / "predictions.npz")
        logits = saved["logits_adam"][0]
        assert saved["logits_adam"].shape == (1, 8, 44)
        percentiles.append((logits[:, None] > logits[None]).mean(1))  # no ties in here
        p = 1 / (1 + np.exp(-logits[:, NINE].astype(np.float64)))
        score = 1 - np.prod(1 - p, axis=1)
        any_percentiles.append((score[:, None] > score[None]).mean(1))
        labels.append(saved["labels"])
    y, percentile = np.concatenate(labels), np.concatenate(percentiles)
    positive, negative = percentile[y[:, IMI] == 1, IMI], percentile[y[:, IMI] == 0, IMI]
    assert len(positive) == 2
    pairs = (positive[:, None] > negative) + (positive[:, None] == negative) / 2
    assert results["types"]["IMI"]["auc"] == pytest.approx(pairs.mean())
    score, infarct = np.concatenate(any_percentiles), y[:, NINE].any(1)
    normal = y[:, NORM] == 1
    pairs = (score[infarct][:, None] > score[normal]) + (
        score[infarct][:, None] == score[normal]
    ) / 2
    assert results["any"]["NORM"]["auc"] == pytest.approx(pairs.mean())
    assert results["any"]["NORM"]["negatives"] == 2


def test_folds_are_ranked_on_their_own_before_they_are_joined():
    """Logits of two folds lie apart, each in perfect order: the joined AUC must be 1."""
    folds = np.repeat([1, 2], 50)
    y = np.tile(np.arange(50) >= 40, 2).astype(int)[:, None]
    logits = (np.tile(np.arange(50.0), 2) + 1000 * (folds == 2))[:, None]
    assert selfmis.macro_auc(y, logits)[0] < 0.8
    percentile = pool.within_folds(logits, folds)
    assert selfmis.macro_auc(y, percentile)[0] == 1
    assert percentile.min() > 0 and percentile.max() < 1
    np.testing.assert_allclose(percentile[:50], percentile[50:])
    tied = pool.within_folds(np.array([[1.0], [1.0], [3.0], [5.0]]), np.array([1, 1, 1, 2]))
    np.testing.assert_allclose(tied, [[1.5 / 4], [1.5 / 4], [3 / 4], [1 / 2]])


def test_any_infarct_is_ranked_within_the_fold_too():
    rng = np.random.default_rng(0)
    folds = np.repeat([1, 2], 50)
    logits = rng.normal(size=(100, 44)) + 5 * (folds == 2)[:, None]
    score = pool.within_folds(infarct_score(logits), folds)
    p = 1 / (1 + np.exp(-logits[:, NINE]))
    expected = -np.log(np.prod(1 - p, axis=1))
    for fold in (1, 2):
        rows = folds == fold
        np.testing.assert_array_equal(np.argsort(score[rows]), np.argsort(expected[rows]))
    assert abs(np.median(score[:50]) - np.median(score[50:])) < 0.01


def test_one_fold_is_that_runs_own_table(tmp_path, folds):
    own = read(folds[5])
    pool.main([str(folds[5]), "--out", str(tmp_path / "one")])
    pooled = read(tmp_path / "one")
    for key in ("types", "nine", "six", "diagnostic", "any"):
        assert pooled[key] == own[key]


def test_both_heads_and_a_fine_tuned_network(tmp_path, ptbxl, tiny):
    """Its own training and validation folds are no labels of the fold that it tests."""
    usual = dict(data=[str(ptbxl)], encoder=tiny[1], epochs=1, workers=0, batch_size=16)
    names = {"both": dict(seeds=2), "tuned": dict(finetune=True)}
    for name, more in names.items():
        for fold in (4, 5):
            out = str(tmp_path / f"{name}{fold}")
            main(ProbeConfig(val_fold=9 - fold, test_fold=fold, out=out, **usual | more))
        pool.main(
            [str(tmp_path / f"{name}{fold}") for fold in (4, 5)] + ["--out", str(tmp_path / name)]
        )
    both, tuned = (read(tmp_path / name) for name in names)
    assert set(both["heads"]) == {"adam", "logistic"} and list(tuned["heads"]) == ["finetune"]
    first = next(iter(read(tmp_path / "both4")["heads"]))
    assert next(iter(both["heads"])) == first and both["six"] == both["heads"][first]["six"]
    refused(
        [tmp_path / "both4", tmp_path / "tuned5"], "tuned5: finetune is True, but False in .*both4"
    )


# ---- what it refuses -----------------------------------------------------------------------------


def seen(**entry):
    return [dict(data="ptb-xl", use="training", folds=[1, 3], labels=True, records=16) | entry]


@pytest.mark.parametrize(
    "entries, how",
    [
        (seen(), "trained on fold 1 of ptb-xl with labels"),
        (seen(use="validation"), "chosen by fold 1 of ptb-xl with labels"),
        (seen(folds=[4]) + seen(folds=[]), "trained on fold 1 of ptb-xl"),  # nobody knows which
    ],
    ids=["trained", "chosen", "unknown folds"],
)
def test_an_encoder_that_saw_labels_of_the_tested_fold_is_refused(copies, entries, how):
    for folder in copies:
        change_pt(folder / "probe.pt", training_data=entries)
    refused(copies, f"run1: its encoder or the encoder's teacher was {how}")


@pytest.mark.parametrize(
    "entries",
    [seen(labels=False), seen(folds=[3, 4]), seen(data="mimic-iv-ecg")],
    ids=["no labels", "other folds", "other data"],
)
def test_an_encoder_that_saw_none_of_them_is_joined(copies, entries, capsys):
    for folder in copies:
        change_pt(folder / "probe.pt", training_data=entries)
    pool.main([str(folder) for folder in copies])
    assert "AUC on folds 1, 2" in capsys.readouterr().out


def test_each_fold_may_have_an_encoder_of_its_own(copies, capsys):
    """Run 1's encoder saw fold 2, run 2's saw fold 1: neither saw the fold that it is tested on."""
    for folder, other in zip(copies, (2, 1), strict=True):
        change_json(folder / "results.json", encoder=f"teacher{other}.pt")
        change_pt(folder / "probe.pt", training_data=seen(folds=[other]))
    pool.main([str(folder) for folder in copies])
    assert "AUC on folds 1, 2" in capsys.readouterr().out


def test_warnings_of_the_runs_stay(tmp_path, copies, capsys):
    warnings = [f"the encoder was trained on fold {fold} without labels" for fold in (1, 2)]
    for folder, warning in zip(copies, warnings, strict=True):
        content = json.loads((folder / "results.json").read_text())
        content["warnings"] = [warning, "said by both"]
        (folder / "results.json").write_text(json.dumps(content))
    pool.main([*map(str, copies), "--out", str(tmp_path / "out")])
    expected = [warnings[0], "said by both", warnings[1]]
    assert read(tmp_path / "out")["warnings"] == expected
    text = (tmp_path / "out/results.md").read_text()
    assert [text.count(f"warning: {warning}\n") for warning in expected] == [1, 1, 1]


def test_a_fold_that_is_tested_twice_is_refused(copies, tmp_path):
    shutil.copytree(copies[0], tmp_path / "again")
    sentence = "run1 and .*again: both are tested on fold 1; leave one out"
    refused([*copies, tmp_path / "again"], sentence)


@pytest.mark.parametrize(
    "setting, value, other",
    [
        ("head", "both", "adam"),
        ("data", ["ptb-xl-1.0.1"], r"\['.*ptb-xl0'\]"),
        ("limit", 50, "None"),
        ("seeds", 3, "1"),
        ("epochs", 3, "2"),
        ("finetune", True, "False"),
        ("synthetic_only", True, "False"),
    ],
)
def test_other_settings_are_refused(copies, setting, value, other):
    change_json(copies[1] / "results.json", **{setting: value})
    refused(copies, f"run2: {setting} is .*, but {other} in .*run1; pool runs that differ in their")


@pytest.mark.parametrize(
    "entry, value",
    [
        ("lead", "II"),
        ("sample_rate_hz", 500.0),
        ("preprocessing", {"normalize": "none", "filter": "none"}),
        ("training_data", seen(folds=[3])),  # an aligned encoder beside a random one
    ],
)
def test_another_input_or_kind_of_encoder_is_refused(copies, entry, value):
    change_pt(copies[1] / "probe.pt", **{entry: value})
    refused(copies, f"run2: {entry} is .*, but .* in .*run1")


def test_what_only_changes_the_speed_or_a_name_is_no_difference(copies, capsys):
    other = dict(workers=3, out="elsewhere", cache="none", debug=True, compare=["x"], lead="I")
    change_json(copies[1] / "results.json", **other)
    pool.main([str(folder) for folder in copies])
    assert "AUC on folds 1, 2" in capsys.readouterr().out


def test_synthetic_records_beside_real_ones_are_refused(copies):
    for folder in copies:
        change_json(folder / "results.json", data=["synthetic:100", "ptb-xl"])
    refused(copies, "run1: synthetic records beside real ones")


@pytest.mark.parametrize("missing", ["results.json", "probe.pt", "predictions.npz"])
@pytest.mark.parametrize("damage", ["removed", "torn", "empty", "foreign"])
def test_unfinished_runs_are_refused(copies, missing, damage):
    path = copies[1] / missing
    content = path.read_bytes()
    path.unlink()
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    if damage == "empty":
        path.write_bytes(b"")
    if damage == "foreign":
        buffer = io.BytesIO()
        np.savez(buffer, other=np.zeros(3))
        foreign = {"results.json": b"{}", "predictions.npz": buffer.getvalue()}
        path.write_bytes(foreign.get(missing, b"other"))
    said = {
        "results.json": "run2: no finished run of train_probe.py",
        "probe.pt": "run2/probe.pt: (there is no such file|not a checkpoint that can be loaded)",
        "predictions.npz": "run2: no readable predictions.npz",
    }
    refused(copies, said[missing])


def test_a_folder_that_is_there_is_never_written_into(copies, tmp_path):
    before = {path: path.read_bytes() for folder in copies for path in folder.iterdir()}
    refused(copies, "--out .*run1: is not empty; give a new folder", "--out", str(copies[0]))
    (tmp_path / "file").write_text("mine")
    refused(copies, "--out .*file: File exists", "--out", str(tmp_path / "file"))
    refused(copies, "--out .*file/new: Not a directory", "--out", str(tmp_path / "file/new"))
    assert before == {path: path.read_bytes() for path in before}
    assert (tmp_path / "file").read_text() == "mine"


def test_a_refusal_is_one_sentence_and_exit_code_2(tmp_path, folds, monkeypatch, capsys):
    """As `python -m extras.pool` gives it."""
    monkeypatch.setattr(sys, "argv", ["pool", str(folds[1]), str(tmp_path / "none")])
    monkeypatch.delitem(sys.modules, "extras.pool")  # or runpy warns
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("extras.pool", run_name="__main__")
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"error: {tmp_path}/none: no finished run of train_probe.py")
