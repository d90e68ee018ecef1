"""extras/recorders.py: what a simple recorder makes of a record."""

import math

import numpy as np
import torch
from conftest import made_up
from scipy import signal

import selfmis
from extras import recorders
from extras.baselines.common import generator

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


def test_every_record_passes_a_recorder_of_its_own_and_keeps_its_place_in_time():
    scored = selfmis.preprocess(made_up(1)[0][0, :1], sample_rate_hz=RATE_HZ)
    x = torch.from_numpy(scored).expand(64, 1, 1000)
    one = recorders.record_simply(x, RATE_HZ, generator(0, 0))
    again = recorders.record_simply(x, RATE_HZ, generator(0, 0))
    other = recorders.record_simply(x, RATE_HZ, generator(0, 1))
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
    own = recorders.main(config)
    plain = recorders.train_pretrain.main(
        recorders.PretrainConfig(out=str(tmp_path / "b"), **flags)
    )
    assert len(passed) == 10 and passed[0].shape == (16, 1, 1000)
    assert own["val_loss"] == plain["val_loss"]  # a recorder that changes nothing
    monkeypatch.undo()
    third = recorders.RecorderConfig(out=str(tmp_path / "c"), **flags)
    assert recorders.main(third)["val_loss"] != plain["val_loss"]
    assert selfmis.load_encoder(tmp_path / "c/best.pt").lead == "I"
