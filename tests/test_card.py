"""Model cards of every kind of checkpoint, and of what is none."""

import numpy as np
import pytest
import torch
from probes import PTBXL_DATA, call, changed, validation_fold, write_probe

import extras.card
import selfmis
import train_probe
from selfmis import MI_TYPES
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain
from train_probe import ProbeConfig


def card(capsys, path):
    code, text, errors = call(extras.card.main, capsys, path)
    assert (code, errors) == (0, [])
    return text


def test_the_card_of_a_probe_says_what_is_stored(tmp_path, capsys):
    path = write_probe(tmp_path / "probe.pt", leads=12, lead="all")
    text, content = card(capsys, path), torch.load(path, weights_only=True)
    parameters = sum(p.numel() for p in selfmis.load_encoder(path).parameters())
    for words in (
        f"{path}: probe, written 2026-11-24 with torch {torch.__version__}, git ?",
        f"{parameters:,} parameters, 12 lead",
        "lead all at 100 Hz, normalize zscore, filter none",
        "trained on, its teacher included: ptb-xl, 17,000 records without labels, folds 1 2\n",
        "head: logistic, 44 statements; its labels: ptb-xl, 17,000 records with labels, folds 1 2",
        "chosen by ptb-xl, 17,000 records with labels, folds 9",
        "AUC on fold 10, 95 % interval: nine 0.790, six 0.810 (0.770 to 0.850), diagnostic 0.830",
        "any infarct against: NORM 0.853 (0.700 to 0.900), others 0.712 (0.700 to 0.900)",
        "reliability: temperature 1.7, ece 0.0123, brier 0.0456",
        "val_fold 9",
        "not a medical device",
    ):
        assert words in text, words
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    for t in MI_TYPES:
        entry = content["results"]["types"][t]
        shown = {"PMI": "2 positives  0.750", "LMI": "0 positives  absent"}
        assert lines[t].endswith(shown.get(t, "30 positives  0.800 (0.700 to 0.900)")), entry
    verdict = extras.card.operating_point(content)
    alarms = f"false alarms: {verdict['false_alarms_normal']:.0%} of its 200 normal and"
    assert f"verdict: finds {verdict['sensitivity']:.0%} of the" in text and alarms in text


def test_a_card_repeats_warnings_and_says_why_there_is_no_verdict(tmp_path, capsys):
    probe = write_probe(tmp_path / "probe.pt")
    few = validation_fold(np.linspace(0, 1, 12), np.arange(12) < 6, np.arange(12) >= 6)
    unclean = "fold 10 of ptb-xl chose the encoder; the test is not clean"
    path = changed(probe, tmp_path / "few.pt", validation=few, warnings=[unclean])
    text = card(capsys, path)
    assert f"warning: {unclean}" in text
    assert "verdict: the validation fold has 6 infarcts and 6 normal records" in text
    synthetic = PTBXL_DATA | {"data": "synthetic:0"}
    data = {"training_data": [], "head_training_data": [synthetic]}
    text = card(capsys, changed(probe, tmp_path / "synthetic.pt", **data))
    assert "trained on, its teacher included: nothing" in text
    assert "warning: trained on synthetic ECG alone" in text


def test_the_cards_of_other_checkpoints(tmp_path, ptbxl, tiny, capsys):
    """Alignment and fine-tuning, best.pt and last.pt; an encoder; ECGFounder; no checkpoint."""
    common = {"data": [str(ptbxl)], "epochs": 1, "workers": 0}
    out = {"single": tiny[1], "multi": tiny[12], "batch_size": 16, "out": str(tmp_path / "p")}
    pretrain(PretrainConfig(**common, **out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_probe, "draw_roc", lambda *arguments: None)
        out = {"encoder": tiny[1], "finetune": True, "out": str(tmp_path / "f")}
        train_probe.main(ProbeConfig(**common, **out))
    capsys.readouterr()
    for name, words in (
        ("p/best.pt", "64 records without labels"),
        ("p/last.pt", "64 records without labels"),
        ("f/best.pt", "64 records with labels"),
        ("f/last.pt", "64 records with labels"),
        ("f/probe.pt", "reliability: temperature"),
    ):
        text = card(capsys, tmp_path / name)
        assert words in text and "lead I at 100 Hz" in text and "parameters" in text, name
    metrics = torch.load(tmp_path / "p/best.pt", weights_only=True)["metrics"]
    assert f"val_loss {metrics['val_loss']:.4g}" in card(capsys, tmp_path / "p/best.pt")
    assert "parameters" in card(capsys, tiny[12])


def test_files_that_selfmis_did_not_write(tmp_path, tiny, capsys):
    state = selfmis.load_encoder(tiny[1]).state_dict()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "founder.pth")
    torch.save(state, tmp_path / "plain.pth")
    text = card(capsys, tmp_path / "founder.pth")
    assert "not written by selfmis" in text and "epoch" in text
    assert next(iter(state)) in card(capsys, tmp_path / "plain.pth")
    torch.save({"architecture": "resnet"}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("text.pt", "nothing.pt"):
        code, _, errors = call(extras.card.main, capsys, tmp_path / name)
        assert code == 2 and len(errors) == 1
        assert errors[0].startswith(f"error: {tmp_path / name}: ")
