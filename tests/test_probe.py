"""The probe: heads, choices that never see the test fold, results and files."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import selfmis
import train_probe
from train_probe import ProbeConfig, adam_head, logistic_head, main


def problem(n=900, d=20, classes=3, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * rng.uniform(0.1, 30, d) + rng.standard_normal(d)
    z = (x - x.mean(0)) / x.std(0) @ rng.standard_normal((d, classes))
    y = z + noise * rng.standard_normal(z.shape) > 1
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    return x[:600], y[:600], x[600:], y[600:]


@pytest.mark.parametrize("head", [adam_head, logistic_head])
def test_separable_features_give_auc_1_and_shuffled_labels_give_chance(head):
    x, y, x_val, y_val = problem(noise=0.0)
    weight, bias, _ = head(x, y, x_val, y_val, ProbeConfig(epochs=100, patience=100, lr=0.05), 0)
    assert selfmis.macro_auc(y_val, x_val @ weight.T + bias)[0] > 0.98
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    weight, bias, _ = head(x, shuffled, x_val, y_val, ProbeConfig(epochs=3), 0)
    draws = selfmis.bootstrap_auc(y_val, x_val @ weight.T + bias, draws=200)
    low, high = selfmis.interval(draws.mean(1), 0.999)
    assert low - 0.05 < 0.5 < high + 0.05


@pytest.mark.parametrize("n", [600, 14])
def test_logistic_head_is_at_the_minimum_of_its_stated_objective(monkeypatch, n):
    """The gradient, by autograd on the plain objective with standardised features, is zero; so is it for collinear features,
    and for fewer records than features or validation records."""
    x, y, x_val, y_val = problem(d=12)
    x, y = x[:n], y[:n]
    x, x_val = (torch.cat([a, a[:, :3] * 2 + 1, torch.ones(len(a), 1)], 1) for a in (x, x_val))  # collinear and constant columns
    for strength in (1.0, 1e-2, 1e-4):
        monkeypatch.setattr(train_probe, "STRENGTHS", (strength,))
        weight, bias, _ = logistic_head(x, y, x_val, y_val, ProbeConfig(), 0)
        mean, deviation = x.double().mean(0), x.double().std(0)
        deviation[deviation == 0] = 1
        w = (weight.double() * deviation).requires_grad_()
        b = (bias.double() + weight.double() @ mean).requires_grad_()
        loss = F.binary_cross_entropy_with_logits((x.double() - mean) / deviation @ w.T + b, y.double(), reduction="sum") / len(y) + strength / 2 * w.square().sum()
        loss.backward()
        assert w.grad.abs().max() < 1e-5 and b.grad.abs().max() < 1e-5


def test_logistic_strength_is_the_best_on_the_validation_fold(monkeypatch):
    x, y, x_val, y_val = problem(noise=4.0)
    _, _, said = logistic_head(x, y, x_val, y_val, ProbeConfig(), 0)
    alone = []
    for strength in train_probe.STRENGTHS:
        monkeypatch.setattr(train_probe, "STRENGTHS", (strength,))
        weight, bias, _ = logistic_head(x, y, x_val, y_val, ProbeConfig(), 0)
        alone.append(selfmis.macro_auc(y_val, x_val @ weight.T + bias)[0])
    assert float(said.split("macro AUC ")[1].split()[0]) == pytest.approx(max(alone), abs=1e-3)


def test_adam_head_ignores_the_scale_of_the_features_and_repeats():
    x, y, x_val, y_val = problem()
    one = adam_head(x, y, x_val, y_val, ProbeConfig(), 3)
    ten = adam_head(10 * x, y, 10 * x_val, y_val, ProbeConfig(), 3)
    torch.testing.assert_close(one[0], 10 * ten[0], rtol=1e-3, atol=1e-5)
    assert torch.equal(one[0], adam_head(x, y, x_val, y_val, ProbeConfig(), 3)[0])
    assert not torch.equal(one[0], adam_head(x, y, x_val, y_val, ProbeConfig(), 4)[0])


def test_early_stopping_keeps_the_best_epoch():
    x, y, x_val, y_val = problem(noise=3.0)
    weight, bias, said = adam_head(x, y, x_val, y_val, ProbeConfig(epochs=40, lr=0.05, patience=3), 0)
    kept = selfmis.macro_auc(y_val, x_val @ weight.T + bias)[0]
    assert f"macro AUC {kept:.4f}" in said


@pytest.fixture(scope="module")
def probed(tmp_path_factory, ptbxl, tiny):
    out = tmp_path_factory.mktemp("probe")
    main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], out=str(out / "run"), epochs=4, seeds=2, workers=0))
    return out / "run"


def test_files_and_their_fields(probed):
    results = json.loads((probed / "results.json").read_text())
    assert set(results) >= {"nine", "six", "diagnostic", "types", "runs", "config"}
    assert set(results["types"]) == set(selfmis.MI_TYPES) and results["types"]["IPMI"]["auc"] is None and results["types"]["IMI"]["positives"] == 1
    assert [(r["head"], r["seed"]) for r in results["runs"]] == [("adam", 0), ("adam", 1), ("logistic", 0)]
    for group in ("nine", "six", "diagnostic"):
        assert results[group]["mean"] == pytest.approx(np.mean([r[group] for r in results["runs"][:2]]))
    files = {path.name for path in probed.iterdir()}
    assert files == {"config.json", "probe.pt", "results.json", "results.md", "roc.png", "predictions.npz"}
    saved = np.load(probed / "predictions.npz")
    assert saved["logits"].dtype == np.float32 and saved["logits_adam"].shape == (2, 8, 44) and (saved["fold"] == 10).all()
    auc = selfmis.macro_auc(saved["labels"], saved["logits_adam"][1])[1]
    assert auc[selfmis.STATEMENTS.index("IMI")] == results["runs"][1]["types"]["IMI"]
    content, y = torch.load(probed / "probe.pt", weights_only=True), saved["validation_labels"]
    threshold, sensitivity, _ = content["points"]["youden"][selfmis.STATEMENTS.index("IMI")].tolist()
    p = 1 / (1 + np.exp(-saved["validation_logits_adam"][0, :, selfmis.STATEMENTS.index("IMI")] / content["temperature"]))
    assert content["results"]["types"]["IMI"]["auc"] == results["runs"][0]["types"]["IMI"]  # of the head that is in it, not the mean over seeds
    assert y.sum(0).tolist() == content["positives"].tolist() and sensitivity == np.mean(p[y[:, selfmis.STATEMENTS.index("IMI")] == 1] >= threshold)


def test_probe_pt_reproduces_its_predictions_and_the_encoder_is_untouched(probed, ptbxl, tiny):
    encoder, before = selfmis.load_encoder(probed / "probe.pt"), torch.load(tiny[1], weights_only=True)["encoder"]
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert (encoder.lead, encoder.sample_rate_hz) == ("I", 100) and encoder.seen == []
    content = torch.load(probed / "probe.pt", weights_only=True)
    weight, bias = content["head"]
    saved = np.load(probed / "predictions.npz")
    signals = torch.stack([selfmis.SelfCuttingDataset([str(name)], encoder.lead, sample_rate_hz=100, **encoder.preprocessing)[0][0] for name in saved["record"]])
    with torch.no_grad():
        logits = encoder(signals.half().float()) @ weight.T + bias
    np.testing.assert_allclose(logits, saved["logits"], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def scrambled(tmp_path_factory, ptbxl):
    """The same data with fold 10's labels turned round among its records."""
    root = tmp_path_factory.mktemp("scrambled")
    (root / "records100").symlink_to(ptbxl / "records100")
    rows = list(csv.DictReader(open(ptbxl / "ptbxl_database.csv", newline="")))
    tens = [row for row in rows if row["strat_fold"] == "10"]
    for row, codes in zip(tens, [row["scp_codes"] for row in tens[1:] + tens[:1]]):
        row["scp_codes"] = codes
    with open(root / "ptbxl_database.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    return root


def test_test_labels_change_no_weight_and_no_choice(tmp_path, probed, scrambled, tiny):
    main(ProbeConfig(data=[str(scrambled)], encoder=tiny[1], out=str(tmp_path / "out"), epochs=4, seeds=2, workers=0))
    a, b = (torch.load(out / "probe.pt", weights_only=True)["head"] for out in (probed, tmp_path / "out"))
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    a, b = (np.load(out / "predictions.npz") for out in (probed, tmp_path / "out"))
    np.testing.assert_array_equal(a["logits_logistic"], b["logits_logistic"])
    assert not (a["labels"] == b["labels"]).all()


def test_test_labels_change_nothing_in_finetuning(tmp_path, ptbxl, scrambled, tiny):
    chosen = []
    for k, root in enumerate((ptbxl, scrambled)):
        main(ProbeConfig(data=[str(root)], encoder=tiny[1], finetune=True, lr=0.01, batch_size=16, epochs=3, out=str(tmp_path / str(k)), workers=0))
        lines = map(json.loads, open(tmp_path / str(k) / "log.jsonl"))
        chosen.append(([line["val_macro_auc"] for line in lines], torch.load(tmp_path / str(k) / "best.pt", weights_only=True)["head"][0]))
    assert chosen[0][0] == chosen[1][0] and torch.equal(chosen[0][1], chosen[1][1])


def test_twice_gives_the_same_results(tmp_path, probed, ptbxl, tiny):
    main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], out=str(tmp_path / "out"), epochs=4, seeds=2, workers=0, cache="none"))
    a, b = (json.loads((out / "results.json").read_text())["runs"] for out in (probed, tmp_path / "out"))
    assert a == b


def test_a_patient_in_two_parts_is_an_error(tmp_path, ptbxl, tiny):
    root = tmp_path / "ptb-xl"
    root.mkdir()
    (root / "records100").symlink_to(ptbxl / "records100")
    (root / "ptbxl_database.csv").write_text((ptbxl / "ptbxl_database.csv").read_text().replace("1009.0", "1000.0"))  # folds 10 and 1
    with pytest.raises(ValueError, match="patient has records in two"):
        main(ProbeConfig(data=[str(root)], encoder=tiny[1], out=str(tmp_path / "out"), workers=0))


def test_a_twelve_lead_encoder_asked_for_one_lead_gets_zeros(tmp_path, ptbxl, tiny, capsys):
    main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[12], lead="V2", out=str(tmp_path / "out"), epochs=2, head="adam", workers=0))
    assert "zeros for the other eleven" in capsys.readouterr().out
    encoder = selfmis.load_encoder(tiny[12])
    saved, content = np.load(tmp_path / "out/predictions.npz"), torch.load(tmp_path / "out/probe.pt", weights_only=True)
    whole = torch.zeros(8, 12, 1000)
    for i, name in enumerate(saved["record"]):
        whole[i, 7] = selfmis.SelfCuttingDataset([str(name)], "V2", sample_rate_hz=100)[0][0][0].half().float()
    with torch.no_grad():
        logits = encoder(whole) @ content["head"][0].T + content["head"][1]
    np.testing.assert_allclose(logits, saved["logits"], rtol=1e-3, atol=1e-4)
    assert content["lead"] == "V2"


def test_finetuned_encoder_says_what_it_has_seen_and_is_a_teacher(tmp_path, ptbxl, tiny, capsys):
    out = tmp_path / "teacher"
    main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[12], finetune=True, epochs=2, batch_size=16, out=str(out), workers=0))
    teacher = selfmis.load_encoder(out / "best.pt")
    trained = {"data": "ptb-xl", "folds": list(range(1, 9)), "labels": True, "records": 64}
    assert teacher.lead == "all" and teacher.seen == [trained, {"data": "ptb-xl", "folds": [9], "labels": True, "records": 8, "use": "validation"}]
    from train_pretrain import PretrainConfig
    from train_pretrain import main as pretrain

    pretrain(PretrainConfig(data=[str(ptbxl)], single=tiny[1], multi=str(out / "best.pt"), epochs=1, batch_size=16, out=str(tmp_path / "aligned"), workers=0))
    aligned = selfmis.load_encoder(tmp_path / "aligned/best.pt")
    assert aligned.lead == "I" and [entry["labels"] for entry in aligned.seen] == [True, True, False, False]
    assert "chosen by ptb-xl, 8 records with labels, folds 9" in selfmis.describe_checkpoint(tmp_path / "aligned/best.pt")
    capsys.readouterr()
    main(ProbeConfig(data=[str(ptbxl)], encoder=str(tmp_path / "aligned/best.pt"), val_fold=8, test_fold=9, head="adam", epochs=1, out=str(tmp_path / "c"), workers=0))
    assert "warning: the encoder or its teacher was chosen by fold 9 of ptb-xl with labels" in capsys.readouterr().out
    main(ProbeConfig(data=[str(ptbxl)], encoder=str(tmp_path / "aligned/best.pt"), val_fold=10, test_fold=8, head="adam", epochs=2, out=str(tmp_path / "p"), workers=0))
    assert "warning: the encoder or its teacher was trained on fold 8 of ptb-xl with labels" in capsys.readouterr().out


def test_fine_tuning_without_data_is_a_demonstration_too(tmp_path, tiny, capsys):
    main(ProbeConfig(encoder=tiny[1], finetune=True, limit=200, epochs=1, out=str(tmp_path / "out"), workers=0))
    assert "demonstration on synthetic ECG with --data synthetic:3000\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--finetune trains its own head"):
        main(ProbeConfig(encoder=tiny[1], finetune=True, head="logistic", out=str(tmp_path / "b"), workers=0))


def test_fractions_are_random_nested_shares_of_the_training_labels_alone(tmp_path, ptbxl, tiny, capsys):
    """Table 3: validation and test stay; a run of its own with that share gives the same numbers; a small share is not the whole."""
    rows = np.arange(100, 180)
    half, quarter = (set(train_probe.part_of(rows, f, 3).tolist()) for f in (0.5, 0.25))
    assert len(half) == 40 and len(quarter) == 20 and quarter < half < set(rows.tolist()) and half != set(train_probe.part_of(rows, 0.5, 4).tolist())
    make = lambda out, **more: ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], out=str(tmp_path / out), epochs=3, workers=0, cache=str(tmp_path / "cache"), **more)
    all_at_once = main(make("a", fractions=[0.25, 0.5, 1.0], seeds=2))
    assert [(r["head"], r["fraction"], r["seed"]) for r in all_at_once["runs"]] == (
        [("adam", f, s) for f in (1.0, 0.5, 0.25) for s in (0, 1)] + [("logistic", 1.0, 0)] + [("logistic", f, s) for f in (0.5, 0.25) for s in (0, 1)]
    )
    text = (tmp_path / "a/results.md").read_text()
    assert "| positives | adam, 100 % | adam, 50 % | adam, 25 % | logistic, 100 %" in text and "nan" not in text and f"| IMI | {all_at_once['types']['IMI']['positives']} | 0." in text
    alone = main(make("b", fractions=[0.5, 0.5], seed=1, head="logistic"))
    assert len(alone["runs"]) == 1 and "tested on fold 10, 50 % of the training labels" in (tmp_path / "b/results.md").read_text()
    one = next(r for r in all_at_once["runs"] if (r["head"], r["fraction"], r["seed"]) == ("logistic", 0.5, 1))
    assert str(alone["runs"][0]) == str(one) and one["six"] != next(r for r in all_at_once["runs"] if (r["head"], r["fraction"]) == ("logistic", 1.0))["six"]
    assert all_at_once["six"]["mean"] == pytest.approx(np.mean([r["six"] for r in all_at_once["runs"][:2]]))
    capsys.readouterr()
    main(make("tuned", fractions=[0.25], finetune=True, batch_size=8))
    assert "usable: 16 train, 8 val, 8 test" in capsys.readouterr().out and json.loads((tmp_path / "tuned/config.json").read_text())["records"]["train"] == 16
    assert torch.load(tmp_path / "tuned/probe.pt", weights_only=True)["head_seen"][0]["records"] == 16
    with pytest.raises(ValueError, match="--fractions 1.5"):
        main(make("c", fractions=[1.5]))


def test_rotation_tests_every_record_once_with_a_head_that_never_saw_its_fold(tmp_path, ptbxl, tiny):
    results = main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], rotate=True, head="adam", epochs=3, out=str(tmp_path / "all"), workers=0))
    saved = np.load(tmp_path / "all/predictions.npz")
    assert len(saved["labels"]) == len(set(saved["record"].tolist())) == 80 and results["types"]["IMI"]["positives"] == 10
    alone = main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], head="adam", epochs=3, val_fold=3, test_fold=4, out=str(tmp_path / "four"), workers=0))
    np.testing.assert_allclose(saved["logits"][saved["fold"] == 4], np.load(tmp_path / "four/predictions.npz")["logits"], rtol=1e-4, atol=1e-5)
    assert alone["types"]["IMI"]["positives"] == 1 and not (tmp_path / "all/probe.pt").exists()


def test_any_infarct_is_one_minus_the_product():
    """Against all others and against NORM alone, by probabilities in float64; a single head and the mean of two."""
    rng = np.random.default_rng(0)
    y = np.zeros((60, 44), np.uint8)
    y[np.arange(60), [selfmis.STATEMENTS.index(name) for name in ("IMI", "ASMI", "PMI", "NORM", "NORM", "LVH") * 10]] = 1
    logits = rng.normal(size=(2, 60, 44)) + 0.7 * y
    one = np.zeros(60, int)
    nine = [selfmis.STATEMENTS.index(t) for t in selfmis.MI_TYPES]
    expected = {"others": [], "NORM": []}
    for run in logits:
        p = 1 - np.prod(1 - 1 / (1 + np.exp(-run[:, nine])), 1)
        for other, negatives in (("others", (3, 4, 5)), ("NORM", (3, 4))):
            pairs = [(p[i] > p[j]) for i in range(60) if i % 6 < 3 for j in range(60) if j % 6 in negatives]
            expected[other].append(np.mean(pairs))
    found = train_probe.any_infarct(list(logits), y, one, np.arange(60))
    for other, n in (("others", 30), ("NORM", 20)):
        c = found[other]
        assert c["auc"] == pytest.approx(np.mean(expected[other])) and c["low"] < c["auc"] < c["high"] and (c["positives"], c["negatives"]) == (30, n)
    none = train_probe.any_infarct(list(logits), y * (y[:, nine].sum(1, keepdims=True) == 0), one, np.arange(60))
    assert all(np.isnan(c["auc"]) and c["positives"] == 0 for c in none.values())


def test_synthetic_records_alone_train(tmp_path, ptbxl, tiny, capsys):
    """Real records choose and test: those of the other folds are not read, and change nothing."""
    make = lambda out, root=ptbxl, **more: ProbeConfig(data=["synthetic:60", str(root)], encoder=tiny[1], synthetic_only=True, head="adam", epochs=3, out=str(tmp_path / out), workers=0, **more)
    main(make("a"))
    counts, content = json.loads((tmp_path / "a/config.json").read_text())["records"], torch.load(tmp_path / "a/probe.pt", weights_only=True)
    assert (counts["train"], counts["val"], counts["test"]) == (60, 8, 8)
    chosen = {"data": "ptb-xl", "folds": [9], "labels": True, "records": 8, "use": "validation"}
    assert content["head_seen"] == [{"data": "synthetic:2", "labels": True, "records": 60}, chosen]
    torch.save(torch.load(tiny[1], weights_only=True) | dict(seen=content["head_seen"]), tmp_path / "seen.pt")
    capsys.readouterr()  # whatever their folds, all of these synthetic records were trained on
    main(ProbeConfig(data=["synthetic:100"], encoder=str(tmp_path / "seen.pt"), head="adam", epochs=1, out=str(tmp_path / "again"), workers=0))
    assert "trained on fold 10 of synthetic:2 with labels; the test is not clean" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--rotate: .* was chosen by fold 9 of ptb-xl with labels, so it cannot be tested there"):
        main(ProbeConfig(data=[str(ptbxl)], encoder=str(tmp_path / "seen.pt"), rotate=True, out=str(tmp_path / "rotated"), workers=0))
    root = tmp_path / "ptb-xl"
    root.mkdir()
    (root / "records100").symlink_to(ptbxl / "records100")
    lines = (ptbxl / "ptbxl_database.csv").read_text().splitlines(True)
    (root / "ptbxl_database.csv").write_text("".join(line for line in lines if ",9," in line or ",10," in line or "ecg_id" in line))
    main(make("b", root))
    assert all(torch.equal(a, b) for a, b in zip(content["head"], torch.load(tmp_path / "b/probe.pt", weights_only=True)["head"]))
    assert "any MI vs. NORM" in (tmp_path / "a/results.md").read_text()
    for more in (dict(data=[str(ptbxl)]), dict(rotate=True)):
        with pytest.raises(ValueError, match="--synthetic-only: give real and synthetic --data"):
            main(dataclasses.replace(make("c"), **more))


def test_folds_are_ranked_on_their_own_before_they_are_joined():
    """Heads of two folds whose logits lie apart: within each the order is perfect, so the joined AUC must be 1."""
    folds, y = np.repeat([1, 2], 50), np.tile(np.arange(50) >= 40, 2).astype(int)[:, None]
    logits = (np.tile(np.arange(50.0), 2) + 1000 * (folds == 2))[:, None]
    assert selfmis.macro_auc(y, logits)[0] < 0.8 and selfmis.macro_auc(y, train_probe.within_folds(logits, folds))[0] == 1
    assert train_probe.within_folds(logits[:50], folds[:50]) is not None and (train_probe.within_folds(logits[:50], folds[:50]) == logits[:50]).all()


@pytest.mark.parametrize("labels, refused", [(True, True), (False, False)])
def test_rotation_is_refused_after_labels_of_these_data(tmp_path, ptbxl, tiny, labels, refused, capsys):
    content = torch.load(tiny[1], weights_only=True) | dict(seen=[{"data": "ptb-xl", "folds": [1, 2], "labels": labels}])
    torch.save(content, tmp_path / "seen.pt")
    config = ProbeConfig(data=[str(ptbxl)], encoder=str(tmp_path / "seen.pt"), rotate=True, head="adam", epochs=1, out=str(tmp_path / "out"), workers=0)
    if refused:
        with pytest.raises(ValueError, match="--rotate: .* trained on fold 1, 2 of ptb-xl with labels"):
            main(config)
    else:
        main(config)
        assert "trained on fold 1, 2 of ptb-xl without labels" in capsys.readouterr().out


def test_rotation_and_synthetic_records(tmp_path, ptbxl, tiny):
    """Synthetic records are never tested beside real ones, nor after training on their labels."""
    config = ProbeConfig(data=[str(ptbxl), "synthetic:40"], encoder=tiny[1], rotate=True, out=str(tmp_path / "out"), workers=0)
    with pytest.raises(ValueError, match="--rotate: synthetic records beside real ones would be tested too"):
        main(config)
    content = torch.load(tiny[1], weights_only=True) | dict(seen=[{"data": "synthetic:2", "folds": [3], "labels": True}])
    torch.save(content, tmp_path / "seen.pt")
    with pytest.raises(ValueError, match="--rotate: .* trained on fold 3 of synthetic:2 with labels"):
        main(dataclasses.replace(config, data=["synthetic:400"], encoder=str(tmp_path / "seen.pt")))
    with pytest.raises(ValueError, match="--rotate: every fold tests in turn"):
        main(dataclasses.replace(config, data=["synthetic:400"], test_fold=4))


def test_comparison_is_the_paired_difference(tmp_path, probed, ptbxl, tiny, capsys):
    """Against a run of other seeds: difference of means and of bootstrap draws, by a loop over patients; against itself: 0."""
    other = tmp_path / "other"
    main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], out=str(other), epochs=4, seed=7, workers=0, compare=[str(probed)]))
    results = json.loads((other / "results.json").read_text())
    one, two = (np.load(folder / "predictions.npz") for folder in (other, probed))
    k, y = selfmis.STATEMENTS.index("IMI"), one["labels"][:, selfmis.STATEMENTS.index("IMI")]
    difference = selfmis.roc_auc(y, one["logits_adam"][0, :, k]) - np.mean([selfmis.roc_auc(y, run[:, k]) for run in two["logits_adam"]])
    said = results["compared"][str(probed)]["adam - adam"]["types"]["IMI"]
    assert said["auc"] == pytest.approx(difference) and said["low"] <= difference <= said["high"]
    before = (other / "results.md").read_text()
    for _ in range(2):  # a finished run is compared without another probe, and said once
        main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], out=str(other), epochs=4, seed=7, workers=0, compare=[str(other)], resume=True))
    text = (other / "results.md").read_text()
    assert text.startswith(before) and text.count("this run minus") == 2
    own = json.loads((other / "results.json").read_text())["compared"][str(other)]["logistic - logistic"]
    assert own["six"]["mean"] == own["six"]["low"] == own["six"]["high"] == 0
    with pytest.raises(ValueError, match="--compare .*nowhere.* no readable predictions.npz"):
        main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], out=str(tmp_path / "c"), workers=0, compare=[str(tmp_path / "nowhere")]))
    with pytest.raises(ValueError, match="--compare .* are not this run's 8"):
        main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], test_fold=1, out=str(tmp_path / "d"), workers=0, compare=[str(other)]))


def test_heads_are_compared_with_their_like(tmp_path, probed, ptbxl, tiny):
    """A random encoder beside this one has no partner in a run without; a fine-tuned network is set beside both heads, also when its run goes on."""
    make = lambda out, **more: ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], out=str(tmp_path / out), epochs=1, batch_size=16, workers=0, **more)
    main(make("a", baseline=True, compare=[str(probed)]))
    main(make("b", finetune=True, lr=1e-9, patience=1))
    (tmp_path / "b/results.json").unlink()  # cut off before its end
    main(make("b", finetune=True, lr=1e-9, patience=1, compare=[str(probed)], resume=True))
    compared = [list(json.loads((tmp_path / out / "results.json").read_text())["compared"][str(probed)]) for out in "ab"]
    assert compared == [["adam - adam", "logistic - logistic"], ["finetune - adam", "finetune - logistic"]]


def test_cost_counts_the_paper_s_multiply_accumulates():
    """Table 4: both encoders 61.32 M with heads and 2.33 GMAC; by hand 1.1405 G and 1.1686 G with their heads."""
    cost = selfmis.cost([selfmis.ResNet1D(1), selfmis.ResNet1D(12)], selfmis.View("I", 500, {}), torch.device("cpu"))
    assert cost["parameters"] == 30_587_632 + 30_598_896 and cost["macs"] == pytest.approx(1.1403e9 + 1.1685e9, rel=1e-3)
