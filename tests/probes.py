"""probe.pt files made by hand, so that tests of extras do not wait for train_probe.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, TINY, made_up

import selfmis
from selfmis import LEADS, MI_TYPES, STATEMENTS

NINE = [STATEMENTS.index(t) for t in MI_TYPES]
PTBXL_DATA = {"data": "ptb-xl", "folds": [1, 2], "labels": True, "records": 17_000}
PTBXL_DATA["use"] = "training"


def rows_of(leads):
    return [LEADS.index(lead) for lead in leads]


def validation_fold(score, infarct, normal):
    """What probe.pt keeps of the validation fold."""
    return {
        "any_infarct": torch.tensor(score, dtype=torch.float32),
        "infarct": torch.tensor(infarct, dtype=torch.bool),
        "normal": torch.tensor(normal, dtype=torch.bool),
    }


def usual_fold(seed=0):
    """100 infarcts, 200 normal records and 60 others, whose scores overlap."""
    rng = np.random.default_rng(seed)
    score = np.concatenate([rng.beta(4, 2, 100), rng.beta(2, 5, 200), rng.beta(3, 4, 60)])
    kind = np.repeat([0, 1, 2], [100, 200, 60])
    return validation_fold(score, kind == 0, kind == 1)


def results_of(auc=0.8, low=0.7, high=0.9):
    """The results in a probe.pt; PMI has too few positives for an interval, LMI none at all."""
    entry = {"auc": auc, "low": low, "high": high, "positives": 30}
    types = {t: dict(entry) for t in MI_TYPES}
    types["PMI"] = {"auc": 0.75, "low": None, "high": None, "positives": 2}
    types["LMI"] = {"auc": None, "low": None, "high": None, "positives": 0}
    against = entry | {"negatives": 100}
    return {
        "nine": {"mean": 0.79, "low": None, "high": None},
        "six": {"mean": 0.81, "low": 0.77, "high": 0.85},
        "diagnostic": {"mean": 0.83, "low": 0.80, "high": 0.86},
        "types": types,
        "any": {"NORM": against | {"auc": 0.853}, "others": against | {"auc": 0.712}},
    }


def write_probe(path, leads=1, lead="I", normalize="zscore", **changes):
    """A probe.pt of a tiny random encoder at 100 Hz.

    Its random heads are so steep that two patients get clearly different probabilities.
    """
    torch.manual_seed(leads)
    encoder = selfmis.ResNet1D(leads, **TINY).eval()
    x = np.stack(
        [
            selfmis.preprocess(ecg, sample_rate_hz=100, normalize=normalize)
            for ecg in made_up(40, seed=9)[0]
        ]
    )
    if lead != "all":
        x[:, 1:] = 0  # lead I, then eleven empty ones
    temperature, weight = 1.7, torch.randn(len(STATEMENTS), encoder.embedding_dim)
    with torch.no_grad():
        logits = encoder(torch.from_numpy(x[:, :leads])) @ weight.T
    scale = 1.5 * temperature / logits.std(0)
    spec = selfmis.InputSpec(lead, 100.0, {"normalize": normalize, "filter": "none"})
    content = selfmis.encoder_content(encoder, spec, [PTBXL_DATA | {"labels": False}])
    positives = torch.full((len(STATEMENTS),), 30)
    positives[STATEMENTS.index("PMI")] = 2
    content |= {
        "training_data": [PTBXL_DATA | {"labels": False}],
        "kind": "probe",
        "config": {"test_fold": 10, "val_fold": 9},
        "date": "2026-11-24",
        "torch": str(torch.__version__),
        "git": None,
        "metrics": {},
        "head": (weight * scale[:, None], -logits.mean(0) * scale - 2),
        "classes": list(STATEMENTS),
        "head_name": "logistic",
        "temperature": temperature,
        "head_training_data": [PTBXL_DATA, PTBXL_DATA | {"folds": [9], "use": "validation"}],
        "positives": positives,
        "validation": usual_fold(),
        "results": results_of(),
        "reliability": {"temperature": temperature, "ece": 0.0123, "brier": 0.0456},
        "warnings": [],
    }
    selfmis.save(Path(path), content | changes)
    return Path(path)


KINDS = {
    "one": {},
    "twelve": {"leads": 12, "lead": "all"},
    "one of twelve": {"leads": 12, "lead": "I"},
    "raw": {"normalize": "none"},
}


def changed(path, out, **changes):
    """A copy of a probe.pt in which something else stands."""
    selfmis.save(Path(out), torch.load(path, weights_only=True) | changes)
    return out


def by_hand(path, windows):
    """Probabilities (9,) of preprocessed windows (W, L, T), without CalibratedClassifier."""
    content, encoder = torch.load(path, weights_only=True), selfmis.load_encoder(path)
    x = np.stack(windows)
    if x.shape[1] < encoder.leads:
        x = np.concatenate([x, np.zeros((len(x), 11, x.shape[2]), np.float32)], 1)
    weight, bias = (part.double().numpy() for part in content["head"])
    with torch.no_grad():
        logits = encoder(torch.from_numpy(x)).double().numpy() @ weight.T + bias
    return (1 / (1 + np.exp(-logits / content["temperature"]))).mean(0)[NINE]


def probabilities(entry):
    """(9,) in the order of MI_TYPES of what --json prints of a recording."""
    return np.array([entry["types"][t]["probability"] for t in MI_TYPES])


def call(main, capsys, *arguments):
    """(exit code, printed, error lines) of a command."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err.splitlines()


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def run_module(name, *arguments):
    """python -m NAME, as a user starts it in the repository."""
    command = [sys.executable, "-m", name, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=HERE, capture_output=True, text=True, timeout=150, env=environment
    )
