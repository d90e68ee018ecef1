"""The probe: heads, choices that never see the test fold, results and files."""

import csv
import functools
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from conftest import spy
from matplotlib.figure import Figure
from scipy.integrate import trapezoid
from torch.optim.optimizer import register_optimizer_step_pre_hook

import selfmis
import train_probe
from selfmis import LEADS, MI_TYPES, STATEMENTS, UsageError
from train_probe import NINE, ProbeConfig, TrainedHead, adam_head, logistic_head, main

IMI = STATEMENTS.index("IMI")
NORM = STATEMENTS.index("NORM")


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Intervals of 100 bootstrap draws will do: on eight records most draws are drawn again."""
    quick = functools.partial(selfmis.bootstrap_auc, draws=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfmis, "bootstrap_auc", quick)
        yield


@pytest.fixture
def make(tmp_path, ptbxl, tiny):
    """make("name", ...) are settings of a short run on the tiny PTB-XL, into tmp_path/name."""

    def settings(name, **more):
        usual = dict(data=[str(ptbxl)], encoder=tiny[1], epochs=3, workers=0)
        return ProbeConfig(**usual | dict(out=str(tmp_path / name)) | more)

    return settings


@pytest.fixture
def rates():
    """The learning rate of every step that is taken from now on."""
    taken = []

    def take(optimizer, *_):
        taken.append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(take)
    yield taken
    hook.remove()


def read_json(path):
    return json.loads(path.read_text())


def read_pt(path):
    return torch.load(path, weights_only=True)


def changed(path, to, **entries):
    """A checkpoint with other entries."""
    torch.save(read_pt(path) | entries, to)
    return str(to)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


# ---- heads ---------------------------------------------------------------------------------------


def problem(n=900, d=20, classes=3, noise=1.0, seed=0):
    """Features (600, d) of many scales, labels (600, K); and n - 600 more to validate on."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * rng.uniform(0.1, 30, d) + rng.standard_normal(d)
    z = (x - x.mean(0)) / x.std(0) @ rng.standard_normal((d, classes))
    y = z + noise * rng.standard_normal(z.shape) > 1
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    return x[:600], y[:600], x[600:], y[600:]


def standardised(x):
    """Float64 features as the stated objective has them, with their mean and deviation."""
    mean, deviation = x.double().mean(0), x.double().std(0)
    deviation[deviation == 0] = 1
    return (x.double() - mean) / deviation, mean, deviation


def plain_objective(z, y, weight, bias, strength):
    """Mean logistic loss summed over classes, plus strength / 2 |weight|^2."""
    logits = z @ weight.T + bias
    loss = F.binary_cross_entropy_with_logits(logits, y.double(), reduction="sum") / len(y)
    return loss + strength / 2 * weight.square().sum()


@pytest.mark.parametrize("head", [adam_head, logistic_head])
def test_separable_features_give_auc_1_and_shuffled_labels_give_chance(head):
    x, y, x_val, y_val = problem(noise=0.0)
    settings = ProbeConfig(epochs=100, patience=100, lr=0.05)
    weight, bias, _ = head(x, y, x_val, y_val, settings, 0)
    assert selfmis.macro_auc(y_val, x_val @ weight.T + bias)[0] > 0.98
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    weight, bias, _ = head(x, shuffled, x_val, y_val, ProbeConfig(epochs=3), 0)
    draws = selfmis.bootstrap_auc(y_val, x_val @ weight.T + bias, draws=200)
    low, high = selfmis.interval(draws.mean(1), 0.999)
    assert low - 0.05 < 0.5 < high + 0.05


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("n", [600, 14])
def test_logistic_head_is_at_the_minimum_of_its_stated_objective(monkeypatch, n, strength):
    """The gradient on standardised features is zero, by autograd on the plain objective.

    So it is for collinear and constant features, and for fewer records than features.  The solver
    ends at 1e-6 in its own coordinates, which are at most 4 times finer here.
    """
    x, y, x_val, y_val = problem(d=12)
    x, x_val = (torch.cat([a, a[:, :3] * 2 + 1, torch.ones(len(a), 1)], 1) for a in (x, x_val))
    x, y = x[:n], y[:n]
    monkeypatch.setattr(train_probe, "STRENGTHS", (strength,))
    weight, bias, _ = logistic_head(x, y, x_val, y_val, ProbeConfig(), 0)
    z, mean, deviation = standardised(x)
    w = (weight.double() * deviation).requires_grad_()
    b = (bias.double() + weight.double() @ mean).requires_grad_()
    plain_objective(z, y, w, b, strength).backward()
    assert w.grad.abs().max() < 1e-5 and b.grad.abs().max() < 1e-5


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
def test_logistic_head_agrees_with_scipys_solution(monkeypatch, strength):
    """scipy's own solver in float64 on the same objective, class by class: AUC to 1e-4."""
    x, y, x_val, y_val = problem(noise=2.0)
    monkeypatch.setattr(train_probe, "STRENGTHS", (strength,))
    weight, bias, _ = logistic_head(x, y, x_val, y_val, ProbeConfig(), 0)
    z, mean, deviation = standardised(x)

    def objective(parameters, target):
        parameters = torch.tensor(parameters, requires_grad=True)
        loss = plain_objective(z, target[:, None], parameters[None, :-1], parameters[-1], strength)
        loss.backward()
        return loss.item(), parameters.grad.numpy()

    for k in range(y.shape[1]):
        start = np.zeros(z.shape[1] + 1)
        found = scipy.optimize.minimize(objective, start, y[:, k], jac=True, tol=1e-9)
        assert np.abs(found.jac).max() < 1e-6  # it is a solution itself
        theirs = torch.from_numpy(found.x[:-1]) / deviation
        np.testing.assert_allclose(weight[k] * deviation, theirs * deviation, rtol=1e-3, atol=1e-4)
        their_auc = selfmis.roc_auc(y_val[:, k], (x_val.double() - mean) @ theirs)
        auc = selfmis.roc_auc(y_val[:, k], x_val @ weight[k] + bias[k])
        assert auc == pytest.approx(their_auc, abs=1e-4)


def test_logistic_strength_is_the_best_on_the_validation_fold(monkeypatch):
    x, y, x_val, y_val = problem(noise=4.0)
    _, _, text = logistic_head(x, y, x_val, y_val, ProbeConfig(), 0)
    alone = []
    for strength in train_probe.STRENGTHS:
        monkeypatch.setattr(train_probe, "STRENGTHS", (strength,))
        weight, bias, _ = logistic_head(x, y, x_val, y_val, ProbeConfig(), 0)
        alone.append(selfmis.macro_auc(y_val, x_val @ weight.T + bias)[0])
    assert float(text.split("validation AUC ")[1]) == pytest.approx(max(alone), abs=1e-3)
    assert max(alone) > min(alone) + 2e-3  # so that the choice matters


def test_adam_head_ignores_the_scale_of_the_features_and_repeats():
    x, y, x_val, y_val = problem()
    one = adam_head(x, y, x_val, y_val, ProbeConfig(), 3)
    ten = adam_head(10 * x, y, 10 * x_val, y_val, ProbeConfig(), 3)
    torch.testing.assert_close(one[0], 10 * ten[0], rtol=1e-3, atol=1e-5)
    assert torch.equal(one[0], adam_head(x, y, x_val, y_val, ProbeConfig(), 3)[0])
    assert not torch.equal(one[0], adam_head(x, y, x_val, y_val, ProbeConfig(), 4)[0])


def test_adam_head_keeps_the_best_epoch_and_stops_early_on_one_cosine(monkeypatch, rates):
    x, y, x_val, y_val = problem(noise=3.0)
    settings = ProbeConfig(epochs=40, lr=0.05, patience=3)
    validated = spy(monkeypatch, selfmis, "macro_auc")
    weight, bias, text = adam_head(x, y, x_val, y_val, settings, 0)
    best = int(re.search(r"best epoch (\d+) of 40", text)[1])
    assert len(validated) == best + 3 < 40
    assert rates == [selfmis.cosine_lr(0.05, step, 40 * 10) for step in range(10 * (best + 3))]
    kept = selfmis.macro_auc(y_val, x_val @ weight.T + bias)[0]
    assert f"validation AUC {kept:.4f}" in text


def half_val():
    """Labels (200, 44) of a validation fold: every second record an IMI."""
    y_val = np.zeros((200, 44), np.uint8)
    y_val[::2, IMI] = 1
    return y_val


def made_head(name, val_auc, seed=0, fraction=1.0):
    """A head whose AUC is val_auc on half_val: that share of the negatives lies below 0.5."""
    val = np.zeros((200, 44), np.float32)
    val[::2, IMI] = 0.5
    val[1::2, IMI] = np.arange(100) >= round(100 * val_auc)
    weight, bias = torch.full((44, 2), val_auc), torch.zeros(44)
    return TrainedHead(name, seed, fraction, weight, bias, val, np.zeros((60, 44), np.float32))


@pytest.mark.parametrize(
    "heads, first",
    [
        ([("adam", 0.6), ("logistic", 0.7)], 1),
        ([("adam", 0.7), ("logistic", 0.6)], 0),
        ([("adam", 0.6, 0), ("adam", 0.8, 1), ("logistic", 0.7)], 1),
        # A random encoder beside the own one is no detector, however good,
        ([("adam", 0.6), ("adam, random encoder", 0.9), ("logistic", 0.5)], 0),
        # and neither is a head that was trained on fewer labels.
        ([("adam", 0.6), ("adam", 0.9, 0, 0.25), ("logistic", 0.7)], 2),
    ],
)
def test_the_head_that_is_better_on_the_validation_fold_comes_first(heads, first):
    heads = [made_head(*head) for head in heads]
    assert selfmis.macro_auc(half_val(), heads[0].val_logits)[0] in (0.6, 0.7)
    ordered = train_probe.better_head_first(heads, half_val())
    assert ordered[0] is heads[first]
    assert {id(head) for head in ordered} == {id(head) for head in heads}
    names = [head.name for head in ordered]
    assert names == sorted(names, key=names.index)  # those of a name stand together


# ---- a run and its files -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(tmp_path_factory, ptbxl, tiny):
    """The folder of a run with both heads and two seeds."""
    out = tmp_path_factory.mktemp("probe") / "run"
    main(ProbeConfig([str(ptbxl)], encoder=tiny[1], out=str(out), epochs=4, seeds=2, workers=0))
    return out


@pytest.fixture(scope="module")
def adam_probed(tmp_path_factory, ptbxl, tiny):
    """The folder of a run with the paper's head alone, two seeds."""
    out = tmp_path_factory.mktemp("adam") / "run"
    settings = dict(head="adam", epochs=4, seeds=2, workers=0)
    main(ProbeConfig([str(ptbxl)], encoder=tiny[1], out=str(out), **settings))
    return out


BOTH_RUNS = pytest.mark.parametrize("name", ["probed", "adam_probed"])


@BOTH_RUNS
def test_files_and_their_fields(request, name):
    folder = request.getfixturevalue(name)
    results = read_json(folder / "results.json")
    fields = "nine six diagnostic types any heads runs config warnings reliability minutes"
    assert set(results) == set(fields.split())
    assert set(results["types"]) == set(MI_TYPES)
    assert results["types"]["IPMI"]["auc"] is None and results["types"]["IMI"]["positives"] == 1
    runs = [(run["head"], run["seed"]) for run in results["runs"]]
    expected = [("adam", 0), ("adam", 1)] + [("logistic", 0)] * (name == "probed")
    assert sorted(runs) == expected
    first, *_ = results["heads"]
    assert runs[0][0] == first
    for group in ("nine", "six", "diagnostic"):
        values = [run[group] for run in results["runs"] if run["head"] == first]
        assert results[group]["mean"] == pytest.approx(np.mean(values))
        assert results[group] == results["heads"][first][group]
    assert set(digests(folder)) == {
        *("config.json", "probe.pt", "results.json", "results.md", "roc.png", "predictions.npz")
    }


@BOTH_RUNS
def test_predictions_are_those_that_the_results_are_about(request, name):
    folder = request.getfixturevalue(name)
    results, saved = read_json(folder / "results.json"), np.load(folder / "predictions.npz")
    assert saved["logits"].dtype == np.float32 and saved["logits_adam"].shape == (2, 8, 44)
    assert not np.array_equal(*saved["logits_adam"])  # of two seeds
    assert (saved["fold"] == 10).all() and len(set(saved["record"].tolist())) == 8
    [second] = [run for run in results["runs"] if (run["head"], run["seed"]) == ("adam", 1)]
    order = [run["seed"] for run in results["runs"] if run["head"] == "adam"]
    logits = saved["logits_adam"][order.index(1)]
    auc = selfmis.macro_auc(saved["labels"], logits)[1]
    assert auc[IMI] == second["types"]["IMI"]
    first, *_ = results["heads"]
    np.testing.assert_array_equal(saved["logits"], saved[f"logits_{first}"][0])


@BOTH_RUNS
def test_probe_pt_holds_the_better_head_and_says_what_is_known_of_it(request, name):
    """Better on the validation fold, of all heads and seeds; --head adam leaves no choice."""
    folder = request.getfixturevalue(name)
    results, saved = read_json(folder / "results.json"), np.load(folder / "predictions.npz")
    content, y_val = read_pt(folder / "probe.pt"), saved["validation_labels"]
    aucs = {}
    for key in ("adam", "logistic")[: len(results["heads"])]:
        each = saved[f"validation_logits_{key}"]
        aucs[key] = max(selfmis.macro_auc(y_val, one)[0] for one in each)
    best = max(aucs, key=aucs.get)
    assert content["head_name"] == best == next(iter(results["heads"]))
    assert f"| positives | {best} " in (folder / "results.md").read_text().splitlines()[2]
    # The numbers are of the head that is in the file, not of the mean over seeds.
    assert content["results"]["types"]["IMI"]["auc"] == results["runs"][0]["types"]["IMI"]
    assert content["results"]["six"]["mean"] == results["runs"][0]["six"]
    assert content["positives"].tolist() == y_val.sum(0).tolist()
    assert content["reliability"] == results["reliability"]
    weight, bias = content["head"]
    assert weight.shape == (44, 32) and bias.shape == (44,) and content["classes"] == [*STATEMENTS]
    p = sigmoid(saved[f"validation_logits_{best}"][0][:, NINE] / content["temperature"])
    any_infarct = content["validation"]["any_infarct"]
    np.testing.assert_allclose(any_infarct, 1 - np.prod(1 - p, axis=1), rtol=1e-5)


def test_head_decides_what_probe_pt_holds(make, probed):
    better = read_pt(probed / "probe.pt")["head_name"]
    [other] = {"adam", "logistic"} - {better}
    main(make("other", head=other, epochs=4))
    assert read_pt(make("other").out + "/probe.pt")["head_name"] == other


def recomputed(encoder, head, paths):
    """Logits of a one-lead encoder and its head, without the pass over the records."""
    records = selfmis.SelfCuttingDataset(
        paths.tolist(), encoder.lead, sample_rate_hz=100, **encoder.preprocessing
    )
    signals = torch.stack([single for single, _ in records])
    weight, bias = head
    with torch.no_grad():
        return encoder(signals.half().float()) @ weight.T + bias


def test_probe_pt_reproduces_its_predictions_and_the_encoder_is_untouched(probed, tiny):
    encoder, before = selfmis.load_encoder(probed / "probe.pt"), read_pt(tiny[1])["encoder"]
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert (encoder.lead, encoder.sample_rate_hz) == ("I", 100) and encoder.training_data == []
    saved = np.load(probed / "predictions.npz")
    logits = recomputed(encoder, read_pt(probed / "probe.pt")["head"], saved["record"])
    np.testing.assert_allclose(logits, saved["logits"], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def scrambled(tmp_path_factory, ptbxl):
    """The same data with fold 10's labels turned round among its records."""
    root = tmp_path_factory.mktemp("scrambled")
    (root / "records100").symlink_to(ptbxl / "records100")
    with open(ptbxl / "ptbxl_database.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    tens = [row for row in rows if row["strat_fold"] == "10"]
    codes = [row["scp_codes"] for row in tens[1:] + tens[:1]]
    for row, code in zip(tens, codes, strict=True):
        row["scp_codes"] = code
    with open(root / "ptbxl_database.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    return root


def test_test_labels_change_no_weight_and_no_choice(tmp_path, make, probed, scrambled):
    main(make("out", data=[str(scrambled)], epochs=4, seeds=2))
    a, b = (read_pt(out / "probe.pt") for out in (probed, tmp_path / "out"))
    assert all(torch.equal(p, q) for p, q in zip(a["head"], b["head"], strict=True))
    assert a["head_name"] == b["head_name"] and a["temperature"] == b["temperature"]
    a, b = (np.load(out / "predictions.npz") for out in (probed, tmp_path / "out"))
    np.testing.assert_array_equal(a["logits_logistic"], b["logits_logistic"])
    assert not (a["labels"] == b["labels"]).all()


def test_test_labels_change_nothing_in_finetuning(tmp_path, make, ptbxl, scrambled):
    chosen = []
    for name, root in (("a", ptbxl), ("b", scrambled)):
        main(make(name, data=[str(root)], finetune=True, lr=0.01, batch_size=16))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        chosen.append([json.loads(line)["val_macro_auc"] for line in lines])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 3
    a, b = (read_pt(tmp_path / name / "best.pt")["head"][0] for name in "ab")
    assert torch.equal(a, b)


def test_twice_gives_the_same_results(tmp_path, make, probed):
    main(make("out", epochs=4, seeds=2, cache="none"))
    a, b = (read_json(out / "results.json")["runs"] for out in (probed, tmp_path / "out"))
    assert a == b


def test_a_twelve_lead_encoder_asked_for_one_lead_gets_zeros(tmp_path, make, tiny, capsys):
    main(make("out", encoder=tiny[12], lead="V2", epochs=2, head="adam"))
    assert "zeros for the other eleven" in capsys.readouterr().out
    encoder, content = (
        selfmis.load_encoder(tmp_path / "out/probe.pt"),
        read_pt(tmp_path / "out/probe.pt"),
    )
    saved = np.load(tmp_path / "out/predictions.npz")
    whole = torch.zeros(8, 12, 1000)
    pairs = selfmis.SelfCuttingDataset(saved["record"].tolist(), "V2", sample_rate_hz=100)
    for i in range(8):
        whole[i, LEADS.index("V2")] = pairs[i][0][0].half().float()
    with torch.no_grad():
        logits = encoder(whole) @ content["head"][0].T + content["head"][1]
    np.testing.assert_allclose(logits, saved["logits"], rtol=1e-3, atol=1e-4)
    assert content["lead"] == "V2"


# ---- fine-tuning ---------------------------------------------------------------------------------


def test_fine_tuning_stops_early_and_its_results_are_those_of_the_best_epoch(
    tmp_path, make, monkeypatch
):
    aucs = iter([0.9, 0.1, 0.1, 0.1])
    monkeypatch.setattr(train_probe, "validate", lambda run: next(aucs))
    main(make("out", finetune=True, lr=0.01, batch_size=16, epochs=4, patience=2))
    out = tmp_path / "out"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["val_macro_auc"] for entry in log] == [0.9, 0.1, 0.1]
    saved = np.load(out / "predictions.npz")
    best, last = (
        recomputed(selfmis.load_encoder(out / name), read_pt(out / name)["head"], saved["record"])
        for name in ("best.pt", "last.pt")
    )
    np.testing.assert_allclose(best, saved["logits"], rtol=1e-3, atol=1e-4)
    assert np.abs(last - saved["logits"]).max() > 0.01


def test_fine_tuning_gives_each_record_its_own_labels_on_one_cosine(
    make, ptbxl, monkeypatch, rates
):
    losses = spy(monkeypatch, F, "binary_cross_entropy_with_logits")
    orders = spy(monkeypatch, selfmis, "epoch_batches")
    main(make("out", finetune=True, lr=0.01, batch_size=16, epochs=2))
    labels = selfmis.find_records(str(ptbxl), sample_rate_hz=100).labels
    (_, first_epoch), (_, second_epoch) = orders[-2:]
    for rows, ((_, targets), _) in zip(first_epoch + second_epoch, losses[:8], strict=True):
        np.testing.assert_array_equal(targets, labels[rows])
    assert rates == [selfmis.cosine_lr(0.01, step, 8) for step in range(8)]


def test_finetuned_encoder_says_what_it_has_seen_and_is_a_teacher(tmp_path, make, tiny, capsys):
    from extras.card import describe_checkpoint
    from train_pretrain import PretrainConfig
    from train_pretrain import main as pretrain

    main(make("teacher", encoder=tiny[12], finetune=True, epochs=2, batch_size=16))
    best, aligned = tmp_path / "teacher/best.pt", tmp_path / "aligned/best.pt"
    teacher = selfmis.load_encoder(best)
    entry = {"data": "ptb-xl", "labels": True}
    trained = entry | {"use": "training", "folds": [1, 2, 3, 4, 5, 6, 7, 8], "records": 64}
    chose = entry | {"use": "validation", "folds": [9], "records": 8}
    assert teacher.lead == "all" and teacher.training_data == [trained, chose]
    assert read_pt(tmp_path / "teacher/probe.pt")["training_data"] == [trained, chose]
    settings = dict(single=tiny[1], multi=str(best), epochs=1, batch_size=16, workers=0)
    pretrain(PretrainConfig(make("x").data, out=str(tmp_path / "aligned"), **settings))
    student = selfmis.load_encoder(aligned)
    assert student.lead == "I"
    assert [entry["labels"] for entry in student.training_data] == [True, True, False, False]
    card = describe_checkpoint(aligned)
    assert re.search("chosen by ptb-xl.*8 records.*with labels.*9", card.replace("\n", " "))
    capsys.readouterr()
    quick = dict(encoder=str(aligned), head="adam", epochs=1)
    main(make("c", val_fold=8, test_fold=9, **quick))
    warning = "warning: the encoder or its teacher was"
    assert f"{warning} chosen by fold 9 of ptb-xl with labels" in capsys.readouterr().out
    main(make("p", val_fold=10, test_fold=8, **quick))
    assert f"{warning} trained on fold 8 of ptb-xl with labels" in capsys.readouterr().out


def test_fine_tuning_without_data_is_a_demonstration_too(tmp_path, tiny, capsys):
    flags = f"--encoder {tiny[1]} --finetune --limit 200 --epochs 1 --workers 0 --out {tmp_path}/a"
    settings = selfmis.parse_flags(ProbeConfig, "", flags.split())
    said = capsys.readouterr().out
    assert "a demonstration on synthetic ECG" in said and "--data synthetic:3000\n" in said
    main(settings)
    assert read_json(tmp_path / "a/config.json")["records"]["test"] == 20
    assert "random encoder" not in said and "--baseline" not in said  # which it cannot train


def test_a_demonstration_sets_a_random_encoder_beside_one_that_is_not(tiny, capsys):
    for encoder, has_baseline in (("random", False), (tiny[1], True)):
        settings = selfmis.parse_flags(ProbeConfig, "", ["--encoder", encoder])
        assert settings.baseline == has_baseline and settings.data == ["synthetic:3000"]
        assert ("--baseline" in capsys.readouterr().out) == has_baseline
    with pytest.raises(UsageError, match="--baseline: --encoder is random already"):
        ProbeConfig(baseline=True)


def test_fine_tuning_refuses_what_belongs_to_frozen_encoders():
    with pytest.raises(UsageError, match="--finetune trains a head of its own"):
        ProbeConfig(finetune=True, head="logistic")
    for more in (dict(seeds=2), dict(baseline=True), dict(fractions=[0.5, 1.0])):
        with pytest.raises(UsageError, match="--finetune trains one network: repeat it"):
            ProbeConfig(finetune=True, encoder="best.pt", **more)


# ---- shares of the labels ------------------------------------------------------------------------


def test_shares_of_the_training_records_are_random_and_nested():
    rows = np.arange(100, 180)
    half, quarter = (set(train_probe.share_of(rows, share, 3).tolist()) for share in (0.5, 0.25))
    assert len(half) == 40 and len(quarter) == 20
    assert quarter < half < set(rows.tolist())
    assert half != set(train_probe.share_of(rows, 0.5, 4).tolist())
    assert train_probe.share_of(rows, 1e-9, 0).size == 1
    with pytest.raises(UsageError, match="--fractions .*1.5"):
        ProbeConfig(fractions=[1.5])


def test_fractions_are_shares_of_the_training_labels_alone(tmp_path, make, capsys):
    """Table 3: validation and test stay, and a run of its own gives the same numbers."""
    all_at_once = main(make("a", fractions=[0.25, 0.5, 1.0], seeds=2))
    found = [(run["head"], run["fraction"], run["seed"]) for run in all_at_once["runs"]]
    adam = [("adam", share, seed) for share in (1.0, 0.5, 0.25) for seed in (0, 1)]
    logistic = [(name.replace("adam", "logistic"), share, seed) for name, share, seed in adam]
    logistic.remove(("logistic", 1.0, 1))  # it has one solution
    assert sorted(found) == sorted(adam + logistic)
    text = (tmp_path / "a/results.md").read_text()
    for head in ("adam", "logistic"):
        assert f"{head}, 100 % | {head}, 50 % | {head}, 25 % |" in re.sub(" +", " ", text)
    assert "nan" not in text and re.search(r"\| IMI +\| 1 +\| 0\.\d{3} (± 0\.\d{3})? +\|", text)
    assert re.search("probe.pt holds the \\w+ head of seed [01], the best", capsys.readouterr().out)
    alone = main(make("b", fractions=[0.5, 0.5], seed=1, head="logistic", baseline=True))
    assert "probe.pt holds" not in capsys.readouterr().out  # the baseline is no choice
    assert len(alone["runs"]) == 2
    of = {(run["head"], run["fraction"], run["seed"]): run for run in all_at_once["runs"]}
    assert str(alone["runs"][0]) == str(of["logistic", 0.5, 1])
    assert of["logistic", 0.5, 1]["six"] != of["logistic", 1.0, 0]["six"]
    first, *_ = all_at_once["heads"]
    full = [of[key]["six"] for key in of if key[:2] == (first, 1.0)]
    assert all_at_once["six"]["mean"] == pytest.approx(np.mean(full))
    assert "on lead I: AUC on fold 10" in text
    main(make("tuned", fractions=[0.25], finetune=True, batch_size=8))
    assert "on lead I, with 0.25 of the labels: AUC" in (tmp_path / "tuned/results.md").read_text()
    assert "usable: 16 train, 8 val, 8 test" in capsys.readouterr().out
    assert read_json(tmp_path / "tuned/config.json")["records"]["train"] == 16
    assert read_pt(tmp_path / "tuned/probe.pt")["head_training_data"][0]["records"] == 16
    # A probe.pt of fewer labels says so too.
    assert read_pt(tmp_path / "b/probe.pt")["head_training_data"][0]["records"] == 32


# ---- numbers -------------------------------------------------------------------------------------


def test_any_infarct_is_one_minus_the_product():
    """Against all others and NORM alone, in float64; a single head and the mean of two."""
    rng = np.random.default_rng(0)
    names = ("IMI", "ASMI", "PMI", "NORM", "NORM", "LVH") * 10
    y = np.zeros((60, 44), np.uint8)
    y[np.arange(60), [STATEMENTS.index(name) for name in names]] = 1
    logits = rng.normal(size=(2, 60, 44)) + 0.7 * y
    expected = {"others": [], "NORM": []}
    for run in logits:
        p = 1 - np.prod(1 - sigmoid(run[:, NINE]), 1)
        for other, negatives in (("others", (3, 4, 5)), ("NORM", (3, 4))):
            is_other = np.isin(np.arange(60) % 6, negatives)
            pairs = p[np.arange(60) % 6 < 3, None] > p[None, is_other]
            expected[other].append(pairs.mean())
    scores = [train_probe.infarct_score(run) for run in logits]
    at_two = train_probe.infarct_score(logits[0], 2.0)
    nobody = np.prod(1 - sigmoid(logits[0][:, NINE] / 2), 1)
    np.testing.assert_allclose(1 - np.exp(-at_two), 1 - nobody)
    found = train_probe.any_infarct(scores, y, np.arange(60))
    for other, n in (("others", 30), ("NORM", 20)):
        entry = found[other]
        assert entry["auc"] == pytest.approx(np.mean(expected[other]))
        assert entry["low"] < entry["auc"] < entry["high"]
        assert (entry["positives"], entry["negatives"]) == (30, n)
    healthy = y * (y[:, NINE].sum(1, keepdims=True) == 0)
    none = train_probe.any_infarct(scores, healthy, np.arange(60))
    assert all(np.isnan(entry["auc"]) and entry["positives"] == 0 for entry in none.values())


def labels_with(positives):
    """(400, 44) labels with so many records of each type, {type: n}, each with one type."""
    y = np.zeros((400, 44), np.uint8)
    row = 0
    for name, n in positives.items():
        y[row : row + n, STATEMENTS.index(name)] = 1
        row += n
    y[row:, NORM] = 1
    return y


def test_no_interval_rests_on_fewer_than_ten_positives(tmp_path):
    """Nor does the nine-mean with such a type in it; each number itself stands."""
    enough = {name: 12 for name in MI_TYPES} | {"IMI": 10}
    few = enough | {"PMI": 9, "IPMI": 0}
    for positives in (enough, few):
        y = labels_with(positives)
        scores = np.random.default_rng(0).normal(size=y.shape) + y
        auc, draws = train_probe.mean_auc([scores], y, np.arange(400))
        summary = train_probe.summarize(auc, draws, y)
        for name, entry in summary["types"].items():
            assert entry["positives"] == positives[name]
            assert np.isfinite(entry["auc"]) == (positives[name] > 0)
            assert np.isfinite([entry["low"], entry["high"]]).all() == (positives[name] >= 10)
        assert np.isfinite(summary["nine"]["mean"])
        has_interval = positives is enough
        assert np.isfinite([summary["nine"]["low"], summary["nine"]["high"]]).all() == has_interval
        assert summary["six"]["low"] < summary["six"]["mean"] < summary["six"]["high"]
    written = tmp_path / "results.json"
    selfmis.write_json(written, summary)
    summary = read_json(written)
    assert summary["types"]["PMI"]["low"] is None and summary["nine"]["high"] is None
    assert summary["types"]["IMI"]["low"] is not None
    table = train_probe.as_table({"adam": summary}, summary["types"])
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()}
    assert " to " in rows["IMI"] and " to " in rows["six-type mean"]
    assert re.search(r"PMI +\| 9 +\| 0\.\d{3} +\|", rows["PMI"]) and "absent" in rows["IPMI"]
    assert " to " not in rows["nine-type mean (1 absent)"]


def test_intervals_are_by_patient():
    """Each record twice, both of one patient, has the intervals of each record once."""
    y = labels_with({name: 12 for name in MI_TYPES})
    names = [str(i) for i in range(400)]
    records = selfmis.as_records("ptb-xl", "", names, np.arange(400), labels=y)
    logits = np.random.default_rng(0).normal(size=y.shape) + y
    intervals = []
    for rows in (np.arange(400), np.tile(np.arange(400), 2)):
        head = made_head("adam", 0.7)._replace(test_logits=logits[rows])
        results = train_probe.evaluate([head], records[rows])
        entries = [*results["types"].values(), *results["any"].values()]
        entries += [results[group] for group in train_probe.GROUPS]
        intervals.append([(entry["low"], entry["high"]) for entry in entries])
    np.testing.assert_allclose(*intervals)


def test_any_infarct_has_no_interval_below_ten_positives():
    for n, has_interval in ((9, False), (10, True)):
        y = labels_with({"IMI": n})
        scores = np.random.default_rng(0).normal(size=y.shape) + y
        score = train_probe.infarct_score(scores)
        for entry in train_probe.any_infarct([score], y, np.arange(400)).values():
            assert entry["positives"] == n and np.isfinite(entry["auc"])
            assert np.isfinite([entry["low"], entry["high"]]).all() == has_interval


def test_a_run_on_few_positives_writes_null_and_says_why_once(probed):
    results, text = read_json(probed / "results.json"), (probed / "results.md").read_text()
    for entry in results["types"].values():
        assert entry["low"] is None and entry["high"] is None
    assert results["nine"]["low"] is None and results["nine"]["mean"] is not None
    assert read_pt(probed / "probe.pt")["results"]["types"]["IMI"]["low"] is None
    assert text.count("falsely narrow") == 1 and "10 positives" in text
    for line in text.splitlines():
        if line.startswith(("| IMI", "| nine-type mean")):
            assert " to " not in line


def test_the_six_mean_has_no_interval_either_where_it_rests_on_a_rare_type():
    """Three positives of LMI, in 640 records of three folds: one rare class in six."""
    y = labels_with({name: 12 for name in MI_TYPES} | {"LMI": 3})
    scores = np.random.default_rng(0).normal(size=y.shape) + y
    auc, draws = train_probe.mean_auc([scores], y, np.arange(400))
    six = train_probe.summarize(auc, draws, y)["six"]
    assert np.isfinite(six["mean"]) and np.isnan(six["low"]) and np.isnan(six["high"])


def test_the_area_under_each_roc_curve_is_the_auc_in_its_label(tmp_path, monkeypatch):
    subplots = spy(monkeypatch, Figure, "add_subplot")
    y = labels_with({name: 12 for name in MI_TYPES})
    logits = np.random.default_rng(0).normal(size=y.shape) + y
    head = made_head("adam", 0.7)._replace(test_logits=logits.round(1))  # equal ones among them
    train_probe.draw_roc(tmp_path / "roc.png", head, y)
    [(_, axes)] = subplots
    _, *curves = axes.get_lines()  # after the diagonal
    areas = [trapezoid(curve.get_ydata(), curve.get_xdata()) for curve in curves]
    labels = [f"{t} {area:.3f} (n = 12)" for t, area in zip(MI_TYPES, areas, strict=True)]
    assert [curve.get_label() for curve in curves] == labels


def test_detector_content_by_hand():
    """Scores of the validation fold: 1 - prod(1 - p) with p calibrated, and who is normal."""
    rng = np.random.default_rng(0)
    y = labels_with({"IMI": 40, "PMI": 3, "LVH": 20})
    y[0, NORM] = 1  # labelled both: an infarct is not normal
    logits = (rng.normal(size=y.shape) + 3 * y - 2).astype(np.float32)
    head = TrainedHead("adam", 0, 1.0, torch.ones(44, 2), torch.zeros(44), logits, logits[:5])
    content = train_probe.detector_content(head, y)
    assert content["temperature"] == train_probe.fit_temperature(logits, y)
    expected = np.ones(400)
    for name in MI_TYPES:
        p = sigmoid(logits[:, STATEMENTS.index(name)] / content["temperature"])
        expected *= 1 - p
    validation = content["validation"]
    np.testing.assert_allclose(validation["any_infarct"], 1 - expected, rtol=1e-6)
    assert validation["any_infarct"].dtype == torch.float32
    infarct, normal = validation["infarct"], validation["normal"]
    assert infarct.dtype == normal.dtype == torch.bool
    assert infarct.tolist() == [i < 43 for i in range(400)]
    assert normal.tolist() == [i >= 63 for i in range(400)]
    assert content["positives"].tolist() == y.sum(0).tolist()
    assert content["positives"].dtype == torch.int64
    assert content["head"] == (head.weight, head.bias) and content["head_name"] == "adam"


# ---- what is refused, and when -------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs_to_compare(tmp_path_factory, probed):
    """{name: folder} of a finished run and of two that are none."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("empty", "torn"):
        (folder / name).mkdir()
    (folder / "torn/predictions.npz").write_bytes((probed / "predictions.npz").read_bytes()[:999])
    names = ("empty", "torn", "missing")
    return {"finished": probed} | {name: folder / name for name in names}


REFUSED = {
    "no test fold": (dict(limit=9), "no record in the test part .*--test-fold 10.*folds 1"),
    "no val fold": (dict(limit=8, test_fold=8), "no record in the val part .*--val-fold 9"),
    "no data": (dict(data=["nowhere"]), "nowhere: no such folder"),
    "no encoder": (dict(encoder="nowhere.pt"), "nowhere.pt: there is no such file"),
    "one label": (dict(data=["synthetic:11"]), "--val-fold 9: no statement has positives"),
    "compare missing": (dict(compare="missing"), "missing: no readable predictions"),
    "compare empty": (dict(compare="empty"), "empty: no readable predictions"),
    "compare other fold": (
        dict(compare="finished", test_fold=1),
        "--compare .*run: it was tested on other records; both need the same --data",
    ),
    "one lead, not all": (dict(lead="all"), "--lead all: .* reads one lead"),
    "another size": (dict(size="small"), "--size small: .* holds an encoder of another size"),
    "another rate": (dict(sample_rate=500), "sample_rate: 100 in .*, 500 in --sample-rate"),
    "compare torn": (dict(compare="torn"), "torn: no readable predictions"),
    "batch": (dict(finetune=True, batch_size=65), "64 records do not fill a batch of 1 x 65"),
    "batch of a share": (
        dict(finetune=True, fractions=[0.25], batch_size=17),
        "16 records do not fill a batch of 1 x 17",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_tables_and_flags_say_is_checked_before_anything_is_read_or_lost(
    tmp_path, make, probed, runs_to_compare, monkeypatch, case
):
    """--overwrite over a finished run: each refusal comes before records, and loses nothing."""

    def read_pairs(*arguments):
        raise AssertionError("records were read")

    settings, sentence = REFUSED[case]
    if "compare" in settings:
        settings = settings | dict(compare=[str(runs_to_compare[settings["compare"]])])
    shutil.copytree(probed, tmp_path / "old")
    before = digests(tmp_path / "old")
    monkeypatch.setattr(selfmis, "read_pairs", read_pairs)
    with pytest.raises(UsageError, match=sentence):
        main(make("old", overwrite=True, **settings))
    assert digests(tmp_path / "old") == before


def test_collections_without_labels_are_refused(make, mimic):
    with pytest.raises(UsageError, match="--data .*mimic.*: no labels; give PTB-XL or synthetic"):
        main(make("out", data=[str(mimic)]))


def part_of_ptbxl(ptbxl, root, change):
    """The same records under a changed table; change(text) -> text."""
    root.mkdir()
    (root / "records100").symlink_to(ptbxl / "records100")
    text = (ptbxl / "ptbxl_database.csv").read_text()
    (root / "ptbxl_database.csv").write_text(change(text))
    return str(root)


def test_records_without_a_diagnostic_statement_are_left_out(tmp_path, make, ptbxl, capsys):
    def three_without(text):
        return re.sub(r"'NORM': \d+\.0, ", "", text, count=3)

    root = part_of_ptbxl(ptbxl, tmp_path / "ptb-xl", three_without)
    main(make("out", data=[root], head="adam", epochs=1))
    said = capsys.readouterr().out
    assert "3 records without a diagnostic statement left out\n" in said
    assert "77 records with a diagnostic statement; usable: 61 train, 8 val, 8 test\n" in said


def test_a_patient_in_two_parts_is_an_error(tmp_path, make, ptbxl):
    def same_patient(text):
        return text.replace("1009.0", "1000.0")  # folds 10 and 1

    root = part_of_ptbxl(ptbxl, tmp_path / "ptb-xl", same_patient)
    with pytest.raises(UsageError, match="patient has records in two"):
        main(make("out", data=[root]))


@pytest.mark.parametrize("labels, use", [(True, "validation"), (False, "training")])
def test_the_warning_of_an_unclean_test_stands_wherever_the_numbers_do(
    tmp_path, make, tiny, capsys, labels, use
):
    seen = dict(data="ptb-xl", use=use, folds=[9, 10], labels=labels, records=16)
    encoder = changed(tiny[1], tmp_path / "seen.pt", training_data=[seen])
    main(make("out", encoder=encoder, head="adam", epochs=1))
    how, with_labels = ("chosen by", "with") if labels else ("trained on", "without")
    warning = (
        f"the encoder or its teacher was {how} fold 10 of ptb-xl {with_labels} labels; "
        "the test is not clean"
    )
    assert f"warning: {warning}\n" in capsys.readouterr().out
    out = tmp_path / "out"
    assert read_json(out / "results.json")["warnings"] == [warning]
    assert f"warning: {warning}\n" in (out / "results.md").read_text()
    assert read_pt(out / "probe.pt")["warnings"] == [warning]
    assert read_json(out / "config.json")["warnings"] == [warning]


def test_a_clean_test_has_no_warning(probed):
    """A fold that neither trained nor chose; another collection; an encoder of no data at all."""
    assert read_json(probed / "results.json")["warnings"] == []
    assert read_pt(probed / "probe.pt")["warnings"] == []
    assert "warning" not in (probed / "results.md").read_text()
    settings = ProbeConfig()
    entry = dict(use="training", folds=[1, 2], labels=True)
    encoder = selfmis.ResNet1D(1, stem=16, widths=(16,), depths=(1,))
    encoder.training_data = [entry | {"data": "ptb-xl"}, entry | {"data": "mimic-iv-ecg"}]
    records = selfmis.find_records("synthetic:20", sample_rate_hz=100, seed=2)
    test = records[records.folds == settings.test_fold]
    assert train_probe.test_set_warnings(encoder, test) == []
    encoder.training_data = [entry | {"data": "synthetic:2", "folds": []}]  # whatever their folds
    assert "fold 10 of synthetic:2" in train_probe.test_set_warnings(encoder, test)[0]


# ---- synthetic records beside real ones ----------------------------------------------------------


def test_synthetic_records_alone_train(tmp_path, make, ptbxl, tiny):
    """Real records choose and test: those of the other folds are not read, and change nothing."""

    def needed(text):
        lines = text.splitlines(True)
        return "".join(line for line in lines if re.search("ecg_id|,(9|10),", line))

    only = dict(synthetic_only=True, head="adam")
    main(make("a", data=["synthetic:60", str(ptbxl)], **only))
    counts = read_json(tmp_path / "a/config.json")["records"]
    assert (counts["train"], counts["val"], counts["test"]) == (60, 8, 8)
    content = read_pt(tmp_path / "a/probe.pt")
    trained = dict(data="synthetic:2", use="training", folds=[], labels=True, records=60)
    chose = dict(data="ptb-xl", use="validation", folds=[9], labels=True, records=8)
    assert content["head_training_data"] == [trained, chose]
    assert "any MI vs. NORM" in (tmp_path / "a/results.md").read_text()
    root = part_of_ptbxl(ptbxl, tmp_path / "ptb-xl", needed)
    main(make("b", data=["synthetic:60", root], **only))
    other = read_pt(tmp_path / "b/probe.pt")
    assert all(torch.equal(a, b) for a, b in zip(content["head"], other["head"], strict=True))
    for data in ([str(ptbxl)], ["synthetic:60"]):
        with pytest.raises(UsageError, match="--synthetic-only: give both real and synthetic"):
            main(make("c", data=data, **only))


def test_patients_of_two_collections_are_told_apart_in_every_file(tmp_path, make, ptbxl):
    """Two collections number their patients alike; intervals are by patient everywhere."""
    copy = part_of_ptbxl(ptbxl, tmp_path / "ptb-xl", str)
    main(make("two", data=[str(ptbxl), copy], head="adam", epochs=1))
    saved = np.load(tmp_path / "two/predictions.npz")
    assert len(saved["patient"]) == len(set(saved["patient"].tolist())) == 16
    assert len(set(saved["validation_patient"].tolist())) == 16


# ---- one run beside another ----------------------------------------------------------------------


def test_comparison_is_the_paired_difference(tmp_path, make, monkeypatch):
    """Of means and of draws of patients, against a run of other seeds; against itself: 0."""

    def two_records_each(records):
        return records.row // 20 * 20 + records.folds

    monkeypatch.setattr(selfmis.Records, "patient_keys", two_records_each)
    one, two = tmp_path / "one", tmp_path / "two"
    synthetic = dict(data=["synthetic:600"], epochs=2)  # 12 IMI and 60 records in fold 10
    main(make("one", seeds=2, **synthetic))
    main(make("two", seed=7, compare=[str(one)], **synthetic))
    means, draws = [], []
    for folder in (two, one):
        saved = np.load(folder / "predictions.npz")
        y, each = saved["labels"], saved["logits_adam"]
        means.append(np.mean([selfmis.macro_auc(y, logits)[1] for logits in each], 0))
        by_patient = [selfmis.bootstrap_auc(y, logits, saved["patient"]) for logits in each]
        draws.append(np.mean(by_patient, 0))
    assert y[:, IMI].sum() >= 10 and len(set(saved["patient"].tolist())) == 30
    difference = read_json(two / "results.json")["compared"][str(one)]["adam - adam"]
    entry = difference["types"]["IMI"]
    assert entry["auc"] == pytest.approx((means[0] - means[1])[IMI])
    low, high = selfmis.interval((draws[0] - draws[1])[:, IMI])
    assert (entry["low"], entry["high"]) == (pytest.approx(low), pytest.approx(high))
    assert low <= entry["auc"] <= high
    assert difference["types"]["LMI"]["low"] is None  # one positive
    columns = [STATEMENTS.index(name) for name in selfmis.SIX_TYPES]
    assert difference["six"]["mean"] == pytest.approx((means[0] - means[1])[columns].mean())
    before = (two / "results.md").read_text()
    weights = digests(two)["probe.pt"]
    for _ in range(2):  # a finished run is compared without another probe, and said once
        main(make("two", seed=7, compare=[str(two)], resume=True, **synthetic))
    text = (two / "results.md").read_text()
    assert text.startswith(before) and text.count("this run minus") == 2
    assert digests(two)["probe.pt"] == weights
    own = read_json(two / "results.json")["compared"][str(two)]["logistic - logistic"]
    own = own["types"]["IMI"]
    assert own["auc"] == own["low"] == own["high"] == 0


def test_the_baseline_is_an_untrained_encoder_of_the_same_shape(tmp_path, make, tiny):
    """Its heads are those of a run on that encoder alone."""
    settings = dict(head="logistic", seed=3)
    main(make("a", baseline=True, **settings))
    encoder = selfmis.load_encoder(tiny[1])
    torch.manual_seed(3)
    untrained = selfmis.random_encoder(1, None, like=encoder)
    path = changed(tiny[1], tmp_path / "untrained.pt", encoder=untrained.state_dict())
    main(make("b", encoder=path, **settings))
    both, alone = (np.load(tmp_path / name / "predictions.npz") for name in "ab")
    baseline = both["logits_logistic_random_encoder"]
    np.testing.assert_allclose(baseline, alone["logits_logistic"], rtol=1e-3, atol=1e-4)
    assert np.abs(baseline - both["logits_logistic"]).max() > 0.1


def test_heads_are_compared_with_their_like(tmp_path, make, probed):
    """A random encoder has no partner in a run without; a fine-tuned network is set beside both.

    Also when its run goes on.
    """
    quick = dict(epochs=1, batch_size=16, compare=[str(probed)])
    main(make("a", baseline=True, **quick))
    tuned = dict(finetune=True, lr=1e-9, patience=1)
    main(make("b", **quick | tuned | dict(compare=[])))
    (tmp_path / "b/results.json").unlink()  # cut off before its end
    main(make("b", resume=True, **quick | tuned))
    compared = []
    for name in "ab":
        results = read_json(tmp_path / name / "results.json")
        compared.append(sorted(results["compared"][str(probed)]))
    assert compared[0] == ["adam - adam", "logistic - logistic"]
    assert compared[1] == ["finetune - adam", "finetune - logistic"]
    # The own encoder's columns come first: they are what the run is about.
    heads = list(read_json(tmp_path / "a/results.json")["heads"])
    assert [("random encoder" in head) for head in heads] == [False, False, True, True]
