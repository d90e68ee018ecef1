"""Temperature and reliability of a head (train_probe.py), against plain loops and dense grids."""

import json

import numpy as np
import pytest
import torch
from probes import NINE

import train_probe
from selfmis import STATEMENTS
from train_probe import ProbeConfig, fit_temperature, reliability

WIDTH = len(STATEMENTS)


def simulated(n, seed=0):
    """Logits (n, 44) and labels drawn with exactly their probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, (n, WIDTH))
    return logits, rng.random(logits.shape) < 1 / (1 + np.exp(-logits))


def loss(logits, y, temperature):
    z = np.asarray(logits, np.float64) / temperature
    return (np.logaddexp(0, z) - y * z).mean()


def plain_ece_and_brier(p, y):
    """Means over the columns, by plain loops: ten bins of (nearly) equal size in the order of p."""
    ece, brier, n = [], [], len(p)
    for k in range(p.shape[1]):
        rows, start, error = np.argsort(p[:, k], kind="stable").tolist(), 0, 0.0
        for b in range(10):
            size = n // 10 + (b < n % 10)
            chosen, start = rows[start : start + size], start + size
            error += abs(sum(p[i, k] for i in chosen) - sum(float(y[i, k]) for i in chosen)) / n
        ece.append(error)
        brier.append(sum((p[i, k] - y[i, k]) ** 2 for i in range(n)) / n)
    return sum(ece) / len(ece), sum(brier) / len(brier)


@pytest.mark.parametrize("scale", [0.4, 1, 2, 15])
def test_the_temperature_has_the_least_logistic_loss(scale):
    """No point of a dense grid is better, and it undoes the scale of calibrated logits."""
    logits, y = simulated(3000)
    assert fit_temperature((scale * logits).astype(np.float32), y) == pytest.approx(scale, rel=0.03)
    few, y = (scale * logits[:40]).astype(np.float32), simulated(40, seed=1)[1] | y[:40]
    temperature = fit_temperature(few, y)
    grid = min(loss(few, y, scale * 10**e) for e in np.linspace(-1.5, 3, 3001))
    assert loss(few, y, temperature) <= grid + 1e-9


def test_reliability_against_plain_loops():
    logits, y = simulated(237)
    found = reliability(logits.astype(np.float32), y, 1.3)
    ece, brier = plain_ece_and_brier(1 / (1 + np.exp(-logits[:, NINE] / 1.3)), y[:, NINE])
    assert found == pytest.approx(dict(temperature=1.3, ece=ece, brier=brier), abs=1e-6)


def test_calibration_takes_the_error_of_overconfident_logits_away():
    logits, y = simulated(10_000)
    before = reliability(2 * logits, y, 1.0)
    after = reliability(2 * logits, y, fit_temperature(2 * logits, y))
    assert after["ece"] < 0.015 < 3 * after["ece"] < before["ece"]
    assert after["brier"] < before["brier"]


def test_results_hold_the_calibration_of_the_test_fold(tmp_path, ptbxl, tiny, monkeypatch):
    """ECE and Brier score again from predictions.npz, the temperature from probe.pt."""
    monkeypatch.setattr(train_probe, "draw_roc", lambda *arguments: None)
    flags = {"epochs": 2, "workers": 0, "head": "adam", "out": str(tmp_path / "out")}
    train_probe.main(ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], **flags))
    temperature = torch.load(tmp_path / "out/probe.pt", weights_only=True)["temperature"]
    saved = np.load(tmp_path / "out/predictions.npz")
    p = 1 / (1 + np.exp(-saved["logits"].astype(np.float64) / temperature))
    ece, brier = plain_ece_and_brier(p[:, NINE], saved["labels"][:, NINE])
    results = json.loads((tmp_path / "out/results.json").read_text())
    want = dict(temperature=temperature, ece=ece, brier=brier)
    assert results["reliability"] == pytest.approx(want, abs=1e-6)
