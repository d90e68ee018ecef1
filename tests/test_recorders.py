"""extras/recorders.py and extras/halves.py: what they show the student."""

import math

import numpy as np
import pytest
import torch
from conftest import made_up
from scipy import signal

import selfmis
from extras import halves, recorders
from extras.baselines import crops
from extras.baselines.common import random_stream
from selfmis import UsageError

RATE_HZ = 100


def test_high_pass_is_that_of_a_capacitor_and_a_resistor():
    """A step behind one falls as exp(-2 pi f t)."""
    T, cutoff_hz = 200_000, 0.5
    step = torch.zeros(T)
    step[: T // 2] = 1
    frequency_hz = torch.fft.rfftfreq(T, 1 / 1000)
    passed = torch.fft.irfft(
        torch.fft.rfft(step) * recorders.high_pass(frequency_hz, torch.tensor(cutoff_hz)), n=T
    )
    t = np.arange(0, 1000) / 1000
    expected = np.exp(-2 * math.pi * cutoff_hz * t)
    # The first samples ring, for the step is steeper than half the rate.
    np.testing.assert_allclose(passed[20:1000], expected[20:], atol=0.02)


def test_low_pass_is_butterworth_s_forth_and_back():
    frequency_hz = torch.linspace(0.1, 40, 50)
    b, a = signal.butter(2, 2 * math.pi * 20, analog=True)
    _, response = signal.freqs(b, a, 2 * math.pi * frequency_hz.numpy())
    own = recorders.low_pass(frequency_hz, torch.tensor(20.0))
    np.testing.assert_allclose(own, np.abs(response) ** 2, rtol=1e-5)


def test_how_many_records_meet_what(monkeypatch):
    """Shares and ranges of 4,000 records, and the wander that is left when nothing filters."""
    cutoffs = []
    for name in ("high_pass", "low_pass"):

        def spy(frequency_hz, cutoff_hz, name=name):
            cutoffs.append((name, cutoff_hz.flatten()))
            return torch.ones(1)

        monkeypatch.setattr(recorders, name, spy)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4000, 1, 64)))
    one = recorders.record_simply(x, RATE_HZ, random_stream(0, 0))
    kinds = [name for name, _ in cutoffs]
    assert kinds == ["low_pass", "high_pass", "high_pass", "low_pass"]  # the first is the wander
    limits = ((0.2, 1.5, 1), (0.05, 1, 0.75), (0.05, 0.5, 0.25), (10, 45, 0.5))
    for (_, values), (low, high, share) in zip(cutoffs, limits, strict=True):
        met = values[(values >= low) & (values <= high)]
        assert len(met) / 4000 == pytest.approx(share, abs=0.03)
        assert float(met.log().mean()) == pytest.approx(np.log(low * high) / 2, abs=0.05)
        spared = values[(values < low) | (values > high)]
        assert ((spared == 1e-3) | (spared == math.inf)).all()
    is_swapped = (one * x).sum((1, 2)) < 0
    assert is_swapped.double().mean() == pytest.approx(0.25, abs=0.03)
    wander = (torch.where(is_swapped[:, None, None], -one, one) - x).std((1, 2))
    assert (wander > 1e-6).double().mean() == pytest.approx(0.5, abs=0.03)
    assert 0.95 < wander.max() < 1.1


def test_recorders_take_scored_records_only(tmp_path):
    flags = dict(data=["synthetic:200"], multi="random", loss="softmax", size="small", epochs=1)
    flags |= dict(sample_rate=100, batch_size=16, workers=0, cache="none", normalize="none")
    with pytest.raises(UsageError, match="--normalize none: a simple recorder has lead I"):
        recorders.RecorderConfig(out=str(tmp_path / "a"), **flags)
    with pytest.raises(UsageError, match="--lead V1: a simple recorder has lead I"):
        recorders.RecorderConfig(lead="v1")
    # As an encoder brings it along.
    config = recorders.RecorderConfig(out=str(tmp_path / "a"), **flags | dict(normalize=None))
    config.normalize = "none"
    with pytest.raises(UsageError, match="made for --lead I --normalize none --filter none; a"):
        recorders.main(config)


def test_every_record_passes_a_recorder_of_its_own_and_keeps_its_place_in_time():
    scored = selfmis.preprocess(made_up(1)[0][0, :1], sample_rate_hz=RATE_HZ)
    x = torch.from_numpy(scored).expand(64, 1, 1000)
    one = recorders.record_simply(x, RATE_HZ, random_stream(0, 0))
    again = recorders.record_simply(x, RATE_HZ, random_stream(0, 0))
    other = recorders.record_simply(x, RATE_HZ, random_stream(0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    is_swapped = (one * x).sum((1, 2)) < 0
    assert 6 <= is_swapped.sum() <= 26  # a quarter of 64
    one[is_swapped] *= -1
    errors = (one - x).square().mean((1, 2))
    assert (errors < 1e-2).any() and 0.5 < errors.max() < 2  # some are spared, some are not
    assert len(torch.unique(errors.round(decimals=7))) > 32
    # R peaks stay where they are: a shift would be a task of its own.
    peak = int(x[0, 0, 20:980].argmax()) + 20
    near = one[:, 0, peak - 10 : peak + 11].argmax(1) - 10
    assert near.abs().max() <= 1


def test_halves_are_what_the_student_sees_and_whole_records_validate(tmp_path, monkeypatch):
    flags = dict(data=["synthetic:200"], multi="random", loss="softmax", size="small", epochs=1)
    flags |= dict(sample_rate=100, batch_size=16, workers=0, cache="none", amp="off")
    seen = []
    real = selfmis.SelfMIS.forward

    def spy(self, x, *rest):
        seen.append(x)
        return real(self, x, *rest)

    monkeypatch.setattr(selfmis.SelfMIS, "forward", spy)
    entry = halves.main(halves.HalvesConfig(out=str(tmp_path / "a"), **flags))
    assert [x.shape for x in seen] == 10 * [(16, 1, 500)] and np.isfinite(entry["val_loss"])
    spread = torch.stack([x.std((1, 2)) for x in seen])
    assert 0.15 < spread.log().std() < 0.4  # a gain, and halves that are louder than others
    # As extras/baselines/crops.py draws them.
    x = torch.arange(1000.0).expand(500, 1, 1000)
    half = crops.random_half(x, random_stream(0, 0))
    gain = half[..., 1] - half[..., 0]  # (B, 1)
    start = half[..., 0] / gain
    assert (
        start.min() < 10 and start.max() > 490 and gain.log().std() == pytest.approx(0.2, rel=0.1)
    )


def test_it_trains_as_train_pretrain_does_but_on_other_views(tmp_path, monkeypatch):
    flags = dict(data=["synthetic:200"], multi="random", loss="softmax", size="small", epochs=1)
    flags |= dict(sample_rate=100, batch_size=16, workers=0, cache="none", amp="off")
    config = recorders.RecorderConfig(out=str(tmp_path / "a"), **flags)
    passed = []

    def spy(x, *rest):
        passed.append(x)
        return x

    monkeypatch.setattr(recorders, "record_simply", spy)
    monkeypatch.setattr(recorders, "zscore", lambda x: x)
    halved = []
    monkeypatch.setattr(recorders, "random_half", lambda x, draw: halved.append(x) or x)
    own = recorders.main(config)
    plain = recorders.train_pretrain.main(
        recorders.PretrainConfig(out=str(tmp_path / "b"), **flags)
    )
    assert len(passed) == len(halved) == 10 and passed[0].shape == (16, 1, 1000)
    assert all(map(torch.equal, passed, halved))  # first the recorder, then the half
    assert own["val_loss"] == plain["val_loss"]  # a recorder that changes nothing
    monkeypatch.undo()
    third = recorders.RecorderConfig(out=str(tmp_path / "c"), **flags)
    assert recorders.main(third)["val_loss"] != plain["val_loss"]
    assert selfmis.load_encoder(tmp_path / "c/best.pt").lead == "I"
