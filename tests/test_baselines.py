"""The baselines: their views, and a run of each."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, made_up, run_forked, stopped_after_an_epoch
from methods import GENERATIVE, METHODS

import selfmis
import train_probe
from extras.baselines import clocs, common, heartlang, simclr, three_kg
from extras.synthetic import INDEPENDENT_ROWS
from selfmis import UsageError


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ecg():
    """(8, 12, 500) float64 mV whose limb leads agree."""
    return common.recompute_limbs(torch.from_numpy(made_up(8)[0]).double()[..., :500])


def draws(seed=0):
    return common.random_stream(seed)


def test_a_segment_is_five_seconds_of_its_own_record():
    x = torch.arange(3 * 1000.0).view(3, 1, 1000).expand(3, 12, 1000)
    found = common.random_segment(x, draws())
    assert found.shape == (3, 12, 500)
    starts = found[:, 0, 0]
    torch.testing.assert_close(found[:, 5], starts[:, None] + torch.arange(500.0))
    assert ((starts - 1000 * torch.arange(3)) <= 500).all() and len(set(starts.tolist())) == 3


def test_a_view_is_scored_as_a_record_is_and_a_flat_one_stays_flat(ecg):
    scored = common.zscore(ecg)
    for one, view in zip(ecg, scored, strict=True):
        expected = (one - one.mean()) / one.std(correction=0)
        torch.testing.assert_close(view, expected)
    assert (common.zscore(torch.full((1, 2, 9), 3.0)) == 0).all()


@pytest.mark.parametrize("strength", [simclr.MILD, simclr.PUBLISHED])
def test_disturbances_obey_the_limb_leads(ecg, strength):
    for rate in (100, 500):
        view = simclr.augment(ecg, draws(), rate, strength)
        one, two, three, right, left, foot = view[:, :6].unbind(1)
        torch.testing.assert_close(one + three, two, rtol=0, atol=1e-5)
        torch.testing.assert_close(right + left + foot, 0 * one, rtol=0, atol=1e-5)
        torch.testing.assert_close(left - right, 1.5 * one, rtol=0, atol=1e-5)
        assert not torch.equal(view, ecg)
        torch.testing.assert_close(view, simclr.augment(ecg, draws(), rate, strength))
    none = strength._replace(probability=0.0)
    torch.testing.assert_close(simclr.augment(ecg, draws(), 500, none), ecg)


def test_the_dipole_there_and_back():
    there, back = three_kg.INVERSE_DOWER, three_kg.DOWER
    torch.testing.assert_close(there @ back, torch.eye(3).double(), rtol=0, atol=1e-12)
    kept = back @ there
    torch.testing.assert_close(kept @ kept, kept)
    assert float(kept.trace()) == pytest.approx(3)


def test_no_turn_is_no_change(ecg):
    angles, factors = torch.zeros(8, 3), torch.ones(8, 3)
    torch.testing.assert_close(three_kg.turn(ecg, angles, factors, published=False), ecg)
    kept = three_kg.DOWER @ three_kg.INVERSE_DOWER
    found = three_kg.turn(ecg, angles, factors, published=True)
    torch.testing.assert_close(found[:, INDEPENDENT_ROWS], kept @ ecg[:, INDEPENDENT_ROWS])


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def make_config(tmp_path, ptbxl, config_class=clocs.ClocsConfig, **changed):
    default = dict(data=[str(ptbxl)], size="small", sample_rate=100, epochs=2, batch_size=8)
    default |= dict(workers=0, cache=str(tmp_path / "cache"), warmup=0, out=str(tmp_path / "out"))
    return config_class(**default | changed)


def epochs(out):
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    return [line for line in lines if "val_loss" in line]


def test_the_halves_shown_by_self_cut():
    whole, cut = torch.ones(2000, 12, 3), torch.zeros(2000, 12, 3)
    chosen = clocs.choose(whole, cut, common.random_stream(0))
    assert ((chosen == 0).all((1, 2)) | (chosen == 1).all((1, 2))).all()
    assert 0.45 < float(chosen.mean()) < 0.55
    with pytest.raises(UsageError, match="needs --leads 12"):
        clocs.ClocsConfig(self_cut=True, leads=1)


@pytest.mark.parametrize(
    "more", [dict(leads=1), dict(network="resnet", self_cut=True)], ids=["leads 1", "self-cut"]
)
def test_a_run_learns_resumes_to_the_same_weights_and_is_probed(
    tmp_path, ptbxl, monkeypatch, capsys, more
):
    config = make_config(tmp_path, ptbxl, **more)
    common.main(clocs.CLOCS, config)
    command = f"train_probe.py --encoder {tmp_path / 'out/best.pt'} --data {ptbxl} --lead I\n"
    assert command in capsys.readouterr().out
    losses = [entry["train_loss"] for entry in epochs(tmp_path / "out")]
    assert losses[1] < losses[0] and np.isfinite(epochs(tmp_path / "out")[1]["val_loss"])

    cut = make_config(tmp_path, ptbxl, out=str(tmp_path / "cut"), **more)
    with stopped_after_an_epoch(monkeypatch):
        common.main(clocs.CLOCS, cut)
    common.main(clocs.CLOCS, dataclasses.replace(cut, resume=True))
    weights = [selfmis.read_checkpoint(tmp_path / o / "best.pt")["encoder"] for o in ("out", "cut")]
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key

    encoder = selfmis.load_encoder(tmp_path / "out/best.pt")
    assert encoder.lead == ("I" if config.leads == 1 else "all")
    assert all(not entry["labels"] for entry in encoder.training_data)
    probe = train_probe.ProbeConfig(
        data=[str(ptbxl)], encoder=str(tmp_path / "out/best.pt"), lead="I", head="logistic"
    )
    probe.out, probe.workers, probe.cache, probe.baseline = str(tmp_path / "probe"), 0, "none", True
    is_training, embed = [], selfmis.embed

    def watch(encoder, *rest):
        is_training.append(encoder.training)
        return embed(encoder, *rest)

    monkeypatch.setattr(selfmis, "embed", watch)
    results = train_probe.main(probe)
    assert {run["head"] for run in results["runs"]} == {"logistic", "logistic, random encoder"}
    assert is_training and not any(is_training)  # there are dropouts in it
    assert np.isfinite([run["diagnostic"] for run in results["runs"]]).all()


@pytest.mark.parametrize(
    "name, more",
    [
        ("simclr", dict(network="resnet", published=True)),
        ("simclr", dict(network="resnet")),
        ("three_kg", dict(network="resnet", published=True)),
        ("three_kg", dict(network="resnet")),
        ("crops", dict(leads=1)),
        ("crops", dict(leads=12)),
        ("wav2vec2", dict(leads=1)),
        ("w2v_cmsc", dict(published=True)),
        ("w2v_cmsc", dict(leads=12)),
        ("st_mem", dict(leads=1)),
        ("st_mem", dict(leads=12)),
    ],
)
def test_the_others_run_too_and_their_encoders_open(tmp_path, ptbxl, name, more):
    method, config_class = METHODS[name]
    entry = common.main(method, make_config(tmp_path, ptbxl, config_class, epochs=1, **more))
    assert math.isfinite(entry["train_loss"]) and math.isfinite(entry["val_loss"])
    encoder = selfmis.load_encoder(tmp_path / "out/best.pt").eval()
    x = torch.randn(3, encoder.leads, 1000)
    with torch.no_grad():
        embedding = encoder(x)
        torch.testing.assert_close(encoder(x[1:]), embedding[1:], rtol=1e-4, atol=1e-5)
    assert embedding.shape == (3, encoder.embedding_dim)
    assert encoder.sample_rate_hz == 100
    assert encoder.training_data[0]["labels"] == (name == "crops")


def test_a_checkpoint_cannot_name_another_network(tmp_path, tiny):
    content = selfmis.read_checkpoint(tiny[1]) | dict(network="Popen")
    selfmis.save(tmp_path / "a.pt", content)
    with pytest.raises(UsageError, match="a network 'Popen'; there are ResNet1D, BeatTransformer"):
        selfmis.load_encoder(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "name, flags, sentence",
    [
        ("st_mem", dict(size="small", sample_rate=250), "its patches are for 100 Hz"),
        ("st_mem", dict(sample_rate=100), "its patches are for 250 Hz"),
        ("clocs", dict(lead="I"), "--lead I: give --leads 1"),
        ("clocs", dict(compile=True), "--compile: not for a baseline"),
    ],
)
def test_what_does_not_fit_is_refused(name, flags, sentence):
    with pytest.raises(UsageError, match=sentence):
        METHODS[name][1](**flags)


def test_a_collapse_stops_before_anything_is_saved_and_again_on_resume(tmp_path, ptbxl):
    class Collapsing(clocs.CLOCS):
        def check(self, metrics):
            raise UsageError("collapsed")

    config = make_config(tmp_path, ptbxl, network="resnet", epochs=1)
    for changed in (config, dataclasses.replace(config, resume=True)):
        with pytest.raises(UsageError, match="collapsed"):
            common.main(Collapsing, changed)
    assert not (tmp_path / "out/best.pt").exists()


def test_the_budget_follows_from_the_size_and_flags_go_before_it():
    for size, budget in (
        ("small", (100, 8, 128, 5e-4, 50)),
        ("published", (500, 200, 64, 5e-5, 0)),
    ):
        config = common.with_budget(clocs.ClocsConfig(size=size), clocs.CLOCS)
        schedule = (config.epochs, config.batch_size, config.lr, config.warmup)
        assert (config.sample_rate, *schedule) == budget
    assert common.with_budget(clocs.ClocsConfig(size="small", lr=1.0), clocs.CLOCS).lr == 1.0


@pytest.mark.parametrize(
    "name, betas, weight_decay",
    [
        ("clocs", (0.9, 0.98), 0.01),
        ("st_mem", (0.9, 0.95), 0.01),
        ("pix2pix", (0.5, 0.999), 0.0),
        ("mcma", (0.9, 0.999), 0.0),
    ],
)
def test_the_optimizer_is_adamw_with_the_constants_of_the_method(name, betas, weight_decay):
    method_class, config_class = (METHODS | GENERATIVE)[name]
    config = common.with_budget(config_class(size="small", lr=0.3), method_class)
    with torch.device("meta"):
        method = method_class(config)
    optimizer = common.make_optimizer(method, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(list(method.parameters()))
    assert (group["betas"], group["weight_decay"]) == (betas, weight_decay)
    assert (group["eps"], group["peak"]) == (1e-6, 0.3)


@pytest.fixture
def tiny_resnet(monkeypatch):
    """What --network resnet --size small builds."""
    monkeypatch.setitem(selfmis.SIZES, "small", TINY)


def test_a_method_knows_the_progress_and_validates_without_dropout(tmp_path, ptbxl, tiny_resnet):
    is_training, progress = [], []

    class Watched(clocs.CLOCS):
        def forward(self, *inputs):
            is_training.append(self.training)
            if self.training:
                progress.append(self.progress)
            return super().forward(*inputs)

    common.main(Watched, make_config(tmp_path, ptbxl, network="resnet"))
    assert is_training == 2 * (8 * [True] + [False])
    assert progress == [step / 16 for step in range(16)]


@pytest.mark.parametrize("name", ["clocs", "three_kg"])
def test_two_processes_end_in_the_weights_of_one(
    tmp_path, ptbxl, mimic, tiny_resnet, monkeypatch, name
):
    """With a network and views that draw nothing; some patients have two records."""
    monkeypatch.setattr(three_kg, "random_segment", lambda ecg, draw: ecg[..., :500])
    monkeypatch.setattr(three_kg, "turn", lambda ecg, *_: ecg)
    monkeypatch.setattr(three_kg, "blank_half", lambda x, draw: x)
    method, config_class = METHODS[name]
    more = dict(network="resnet", amp="off", epochs=1, lr=0.01, out=str(tmp_path / "one"))
    one = make_config(tmp_path, ptbxl, config_class, **more)
    one.data.append(str(mimic))
    two = dataclasses.replace(one, out=str(tmp_path / "two"), batch_size=4)
    common.main(method, one)
    assert run_forked(2, partial(common.main, method), two) == [0, 0]
    expected, found = (selfmis.read_checkpoint(tmp_path / o / "last.pt") for o in ("one", "two"))
    for key, value in expected["model"].items():
        torch.testing.assert_close(found["model"][key], value, rtol=1e-4, atol=2e-5, msg=key)
    val_loss = expected["last_entry"]["val_loss"]
    assert found["last_entry"]["val_loss"] == pytest.approx(val_loss, rel=1e-4)


@pytest.mark.parametrize("name", ["w2v_cmsc", "heartlang", "synthetic_pretraining"])
def test_two_processes_train_together(tmp_path, ptbxl, name):
    config = make_config(tmp_path, ptbxl, METHODS[name][1], epochs=1, leads=1)
    if name == "heartlang":
        config.vocabulary_epochs = 1
    start = heartlang.train if name == "heartlang" else partial(common.main, METHODS[name][0])
    assert run_forked(2, start, config) == [0, 0]
    assert selfmis.load_encoder(tmp_path / "out/best.pt").lead == "I"
