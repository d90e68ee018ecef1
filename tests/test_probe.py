"""The probe: heads, choices that never see the test fold, results and files."""

import csv
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


def test_logistic_head_is_at_the_minimum_of_its_stated_objective(monkeypatch):
    """The gradient, by autograd on the plain objective with standardised features, is zero; so is it for collinear features."""
    x, y, x_val, y_val = problem(d=12)
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
    assert teacher.lead == "all" and teacher.seen == [{"data": "ptb-xl", "folds": list(range(1, 9)), "labels": True, "records": 64}]
    from train_pretrain import PretrainConfig
    from train_pretrain import main as pretrain

    pretrain(PretrainConfig(data=[str(ptbxl)], single=tiny[1], multi=str(out / "best.pt"), epochs=1, batch_size=16, out=str(tmp_path / "aligned"), workers=0))
    aligned = selfmis.load_encoder(tmp_path / "aligned/best.pt")
    assert aligned.lead == "I" and [entry["labels"] for entry in aligned.seen] == [True, False]
    capsys.readouterr()
    main(ProbeConfig(data=[str(ptbxl)], encoder=str(tmp_path / "aligned/best.pt"), val_fold=10, test_fold=8, head="adam", epochs=2, out=str(tmp_path / "p"), workers=0))
    assert "warning: the encoder or its teacher was trained on fold 8 of ptb-xl with labels" in capsys.readouterr().out
