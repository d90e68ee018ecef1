"""The pre-training script: what it trains on, and that it learns."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import spy

import selfmis
import train_pretrain
from train_pretrain import PretrainConfig, Training, main, split

ALONE = selfmis.Ranks(0, 1, 1, torch.device("cpu"))


def make(tmp_path, ptbxl, tiny, out="out", **changed):
    settings = dict(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], batch_size=16, epochs=1)
    return PretrainConfig(out=str(tmp_path / out), workers=0, **settings | changed)


def test_folds_split_ptbxl_and_the_test_fold_is_not_read(tmp_path, ptbxl, tiny, monkeypatch):
    records = selfmis.find_records(str(ptbxl), sample_rate_hz=100)
    config = PretrainConfig(val_fold=3, test_fold=7, batch_size=16)
    train, val = split(records, config, ALONE)
    assert set(records.folds[val]) == {3}
    assert set(records.folds[train]) == set(range(1, 11)) - {3, 7}
    read = []
    real = selfmis.Records.read
    monkeypatch.setattr(
        selfmis.Records, "read", lambda self, i, *more: read.append(i) or real(self, i, *more)
    )
    main(make(tmp_path, ptbxl, tiny, val_fold=3, test_fold=7))
    assert sorted(read) == sorted([*train, *val])


def test_the_last_records_of_each_list_without_folds_validate(mimic, ptbxl, capsys):
    mixed = selfmis.find_records(str(ptbxl), sample_rate_hz=100)
    mixed += selfmis.find_records(str(mimic), sample_rate_hz=100)
    train, val = split(mixed, PretrainConfig(val_records=3, batch_size=16), ALONE)
    assert val[-3:].tolist() == [125, 126, 127] and len(val) == 8 + 3 and len(train) == 64 + 45
    train, val = split(mixed, PretrainConfig(batch_size=16), ALONE)
    assert len(val) == 8 + 4 and not set(train) & set(val)
    assert "of 48 records the last 4 validate, not 5,000" in capsys.readouterr().out


def test_mixed_collections_train_together(tmp_path, mimic, ptbxl, tiny):
    data = [str(mimic), str(ptbxl), "synthetic:20"]
    entry = main(make(tmp_path, ptbxl, tiny, data=data, batch_size=32))
    found = selfmis.load_encoder(tmp_path / "out/best.pt").training_data
    assert [(s["data"], s["records"], s["folds"], s["use"]) for s in found] == [
        ("mimic-iv-ecg", 44, [], "training"),
        ("ptb-xl", 64, list(range(1, 9)), "training"),
        ("synthetic:1", 20, [], "training"),
        ("mimic-iv-ecg", 4, [], "validation"),
        ("ptb-xl", 8, [9], "validation"),
    ]
    assert not any(s["labels"] for s in found)
    assert np.isfinite(entry["val_loss"])


def test_the_next_command_keeps_the_folds(tmp_path, ptbxl, tiny, capsys):
    main(make(tmp_path, ptbxl, tiny, "a", val_fold=8, test_fold=9))
    command = f"next: python train_probe.py --encoder {tmp_path / 'a/best.pt'} --data {ptbxl}"
    assert f"{command} --val-fold 8 --test-fold 9\n" in capsys.readouterr().out
    main(make(tmp_path, ptbxl, tiny, "b"))
    text = capsys.readouterr().out
    assert text.endswith(f"--data {ptbxl}\n") and "teacher: mean pairwise cosine 0." in text


@pytest.mark.parametrize("loss", ["paper", "softmax"])
def test_a_teacher_whose_embeddings_coincide_is_said_where_the_loss_has_no_bias(
    tmp_path, ptbxl, tiny, monkeypatch, capsys, loss
):
    monkeypatch.setattr(train_pretrain, "gather_targets", lambda *_: torch.ones(8, 32))
    main(make(tmp_path, ptbxl, tiny, loss=loss))
    text = capsys.readouterr().out
    assert "teacher: mean pairwise cosine 1.00" in text
    assert ("without a bias Eq. (3)" in text) == (loss == "paper")


def test_cache_none_gives_the_same_run(tmp_path, ptbxl, mimic, tiny):
    """Also of two collections, whose records a batch mixes."""
    entries = []
    for name, cache in (("a", None), ("b", "none")):
        data = [str(ptbxl), str(mimic)]
        settings = dict(data=data, limit=40, epochs=2, batch_size=8)
        entry = main(make(tmp_path, ptbxl, tiny, name, cache=cache, **settings))
        del entry["records_per_second"]
        entries.append(entry)
    assert entries[0] == entries[1]
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_teacher_is_frozen_and_every_trained_parameter_moves(
    tmp_path, ptbxl, tiny, monkeypatch
):
    before = torch.load(tiny[12], weights_only=True)["encoder"]
    kept = []
    real = train_pretrain.open_encoders
    monkeypatch.setattr(
        train_pretrain, "open_encoders", lambda config: kept.append(real(config)) or kept[0]
    )
    main(make(tmp_path, ptbxl, tiny, loss="learnable", lr=0.01))
    _, teacher, _ = kept[0]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    start = torch.load(tiny[1], weights_only=True)["encoder"]
    end = torch.load(tmp_path / "out/last.pt", weights_only=True)["model"]
    assert all(not torch.equal(start[key], end[f"encoder.{key}"]) for key in start)
    assert end["bias"] != -10


def test_t_and_b_have_a_group_of_their_own_without_weight_decay():
    model = selfmis.SelfMIS(torch.nn.Linear(2, 2), "learnable")
    optimizer = train_pretrain.make_optimizer(model, PretrainConfig(loss="learnable"))
    encoder, others = optimizer.param_groups
    assert encoder["params"] == list(model.encoder.parameters())
    assert others["params"] == [model.log_scale, model.bias]
    assert (encoder["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_each_step_has_its_learning_rates_and_its_records(tmp_path, ptbxl, tiny, monkeypatch):
    """Warm-up, then one cosine over all epochs, for the encoder and for t and b."""
    rates, batches = [], []

    def step_loss(run, rows, *more, real=Training.step_loss):
        rates.append([group["lr"] for group in run.learner.optimizer.param_groups])
        batches.append(rows)
        return real(run, rows, *more)

    monkeypatch.setattr(Training, "step_loss", step_loss)
    config = make(tmp_path, ptbxl, tiny, loss="learnable", lr=1e-3, warmup=3, epochs=2)
    main(config)
    assert rates == [
        [selfmis.cosine_lr(peak, step, 8, warmup=3) for peak in (1e-3, 1e-2)] for step in range(8)
    ]
    train, _ = split(selfmis.find_records(str(ptbxl), sample_rate_hz=100), config, ALONE)
    expected = [selfmis.epoch_batches(train, config, epoch, ALONE) for epoch in (0, 1)]
    np.testing.assert_array_equal(batches, np.concatenate(expected))


def test_each_seed_and_epoch_has_an_order_of_its_own():
    rows = np.arange(100, 140)
    orders = [rows]
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        config = PretrainConfig(seed=seed, batch_size=8)
        orders.append(np.concatenate(selfmis.epoch_batches(rows, config, epoch, ALONE)))
        assert sorted(orders[-1]) == rows.tolist()
    assert len(np.unique(orders, axis=0)) == 4


def test_a_step_goes_down_the_gradient_of_its_own_loss_of_length_1_at_most():
    """Gradients of norms 0.5 and 1000, one after the other."""
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    learner = selfmis.Learner(model, optimizer, PretrainConfig(amp="off"), ALONE)
    short, long = torch.tensor([[0.3, 0.4]]), torch.tensor([[600.0, -800.0]])
    learner.update((model.weight * short).sum())
    torch.testing.assert_close(model.weight.detach(), -short)
    learner.update((model.weight * long).sum())
    torch.testing.assert_close(model.weight.detach(), -short - long / 1000)


def test_best_pt_is_of_the_epoch_of_the_lowest_validation_loss(tmp_path, ptbxl, tiny, monkeypatch):
    losses = iter([1.0, 0.5, 0.7])
    monkeypatch.setattr(train_pretrain, "validate", lambda run: {"val_loss": next(losses)})
    main(make(tmp_path, ptbxl, tiny, epochs=3))
    best = torch.load(tmp_path / "out/best.pt", weights_only=True)
    last = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert (best["metrics"]["epoch"], best["metrics"]["val_loss"]) == (2, 0.5)
    assert (last["epoch"], last["best"]) == (3, 0.5)


def test_validation_loss_is_the_mean_over_whole_batches_of_strangers(
    tmp_path, ptbxl, tiny, monkeypatch
):
    """8 records in threes: the last two are left out."""
    monkeypatch.setattr(train_pretrain, "VALIDATION_BATCH", 3)
    calls = spy(monkeypatch, train_pretrain, "validate")
    main(make(tmp_path, ptbxl, tiny))
    [((run,), metrics)] = calls
    assert len(run.val_rows) == 8
    assert run.val_rows.tolist() != sorted(run.val_rows)  # lists may be sorted by patient
    losses = []
    for signals, targets in run.pairs.batches([run.val_rows[:3], run.val_rows[3:6]]):
        single = selfmis.embed(run.model.encoder, signals, torch.device("cpu"))
        losses.append(run.model.loss(single, targets).item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert metrics["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with small random encoders for 50 Hz, 1.pt and 12.pt."""
    folder = tmp_path_factory.mktemp("small")
    size = dict(stem=16, widths=(16, 32, 64), depths=(1, 1, 1))
    for leads, lead in ((1, "I"), (12, "all")):
        torch.manual_seed(leads)
        spec = selfmis.InputSpec(lead, 50, {"normalize": "zscore", "filter": "none"})
        content = selfmis.encoder_content(selfmis.ResNet1D(leads, **size), spec, [])
        selfmis.save(folder / f"{leads}.pt", content)
    return folder


@pytest.mark.parametrize("loss", ["softmax", "learnable"])
def test_it_learns(small, loss):
    """Held-out synthetic ECG, a small random teacher.

    InfoNCE finds the pairs; the sigmoid loss falls below what the prior alone can reach.
    """
    encoders = {leads: str(small / f"{leads}.pt") for leads in (1, 12)}
    settings = dict(data=["synthetic:600"], loss=loss, batch_size=32, epochs=6, lr=3e-3, warmup=10)
    entry = main(make(small, None, encoders, loss, **settings))
    if loss == "softmax":
        assert entry["r5"] >= 2.5 * 100 * 5 / 60
    else:
        prior = np.log(32) + 31 * np.log(32 / 31)  # a row of 32 logits that are all log(1/31)
        assert entry["train_loss"] < prior - 0.02


@pytest.mark.parametrize(
    "loss, value, message",
    [
        ("paper", 5.86, "only the prior is learned yet; if it stays: --loss learnable"),
        ("learnable", 5.86, "only the prior is learned yet; if it stays: another --loss"),
        ("paper", 642, "warning: the best constant logit gives 5.85; if it stays"),
        ("raw", 727, "warning: the best constant logit gives 5.85; if it stays"),
        ("paper", 5.0, ""),
        ("softmax", 5.86, ""),
    ],
)
def test_a_run_stuck_on_the_prior_or_far_above_it_is_warned_about(capsys, loss, value, message):
    run = SimpleNamespace(config=PretrainConfig(loss=loss), val_rows=np.arange(128))
    train_pretrain.warn_of_plateau(run, value)
    text = capsys.readouterr().out
    assert message in text and bool(text) == bool(message)


def test_a_warm_up_longer_than_the_run_is_said(tmp_path, ptbxl, tiny, capsys):
    main(make(tmp_path, ptbxl, tiny, "a", warmup=4))
    assert "warning: --warmup 4 is longer than the run" in capsys.readouterr().out
    main(make(tmp_path, ptbxl, tiny, "b", warmup=3))
    assert "is longer than the run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "capabilities, auto",
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "off")],
)
def test_auto_is_bf16_where_the_processor_has_it(monkeypatch, capabilities, auto):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert selfmis.choose_amp("auto", cpu) == auto
    assert selfmis.choose_amp("off", cpu) == "off"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert selfmis.choose_amp("auto", cpu) == "off"
