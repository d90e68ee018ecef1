"""The pre-training script: what it trains on, and that it learns."""

import numpy as np
import pytest
import torch

import selfmis
import train_pretrain
from train_pretrain import PretrainConfig, main, split

QUIET = type("Ranks", (), dict(print=lambda self, *text: None))()


def test_folds_split_ptbxl_and_the_test_fold_is_not_read(ptbxl):
    records = selfmis.find_records(str(ptbxl), sample_rate_hz=100)
    train, val = split(records, PretrainConfig(val_fold=3, test_fold=7), QUIET)
    assert set(val.folds) == {3} and set(train.folds) == set(range(1, 11)) - {3, 7}


def test_the_last_records_of_each_list_without_folds_validate(mimic, ptbxl, capsys):
    loud = selfmis.Ranks(0, 1, 0, 1, torch.device("cpu"))
    mixed = selfmis.find_records(str(ptbxl), sample_rate_hz=100) + selfmis.find_records(str(mimic), sample_rate_hz=100)
    train, val = split(mixed, PretrainConfig(val_records=3), loud)
    assert val.paths[-3:].tolist() == mixed.paths[-3:].tolist() and len(val) == 8 + 3 and len(train) == 64 + 45
    train, val = split(mixed, PretrainConfig(), loud)
    assert len(val) == 8 + 4 and "the last 4 of them validate, not 5,000" in capsys.readouterr().out


def test_mixed_collections_train_together(tmp_path, mimic, ptbxl, tiny):
    entry = main(PretrainConfig(data=[str(mimic), str(ptbxl), "synthetic:20"], single=tiny[1], multi=tiny[12], batch_size=32, epochs=1, out=str(tmp_path / "out"), workers=0))
    seen = selfmis.load_encoder(tmp_path / "out/best.pt").seen
    entries = [(s["data"], s["records"], s.get("folds"), s.get("use")) for s in seen]
    assert entries[:3] == [("mimic-iv-ecg", 44, None, None), ("ptb-xl", 64, list(range(1, 9)), None), ("synthetic:1", 20, None, None)]
    assert entries[3:] == [("mimic-iv-ecg", 4, None, "validation"), ("ptb-xl", 8, [9], "validation")] and not any(s["labels"] for s in seen)
    assert np.isfinite(entry["val_loss"])


def test_the_next_command_keeps_the_folds_and_the_loss_its_meaning(tmp_path, ptbxl, tiny, capsys):
    make = lambda out, **more: PretrainConfig(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], batch_size=32, epochs=1, out=str(tmp_path / out), workers=0, **more)
    main(make("a", val_fold=8, test_fold=9))
    said = capsys.readouterr().out
    assert f"next: python train_probe.py --encoder {tmp_path / 'a/best.pt'} --data {ptbxl} --val-fold 8 --test-fold 9\n" in said and "without a bias Eq. (3)" in said
    main(make("b", loss="softmax"))
    said = capsys.readouterr().out
    assert said.endswith(f"--data {ptbxl}\n") and "teacher: mean pairwise cosine" in said and "Eq. (3)" not in said


def test_cache_none_gives_the_same_run(tmp_path, ptbxl, tiny):
    settings = dict(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], batch_size=16, epochs=2, workers=0)
    entries = [main(PretrainConfig(out=str(tmp_path / name), cache=cache, **settings)) for name, cache in (("a", None), ("b", "none"))]
    assert {k: v for k, v in entries[0].items() if k != "records_per_second"} == {k: v for k, v in entries[1].items() if k != "records_per_second"}
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_teacher_is_frozen_and_every_trained_parameter_moves(tmp_path, ptbxl, tiny):
    before = torch.load(tiny[12], weights_only=True)["encoder"]
    kept = []
    real = train_pretrain.open_encoders
    train_pretrain.open_encoders = lambda config: kept.append(real(config)) or kept[0]
    try:
        main(PretrainConfig(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], loss="learnable", batch_size=16, epochs=1, lr=0.01, out=str(tmp_path / "out"), workers=0))
    finally:
        train_pretrain.open_encoders = real
    _, teacher, _ = kept[0]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items()) and not any(p.requires_grad for p in teacher.parameters())
    start, end = torch.load(tiny[1], weights_only=True)["encoder"], torch.load(tmp_path / "out/last.pt", weights_only=True)["model"]
    assert all(not torch.equal(start[key], end[f"encoder.{key}"]) for key in start) and end["bias"] != -10


@pytest.mark.parametrize("loss", ["softmax", "learnable"])
def test_it_learns(tmp_path, loss):
    """Held-out synthetic ECG, a small random teacher: InfoNCE finds the pairs; the sigmoid loss falls below what the prior alone can reach."""
    size = dict(stem=16, widths=(16, 32, 64), depths=(1, 1, 1))
    view = selfmis.View("all", 50, {"normalize": "zscore", "filter": "none"})
    for leads, lead in ((1, "I"), (12, "all")):
        torch.manual_seed(leads)
        selfmis.save(tmp_path / f"{leads}.pt", selfmis.encoder_content(selfmis.ResNet1D(leads, **size), view._replace(lead=lead), []))
    entry = main(PretrainConfig(data=["synthetic:600"], single=str(tmp_path / "1.pt"), multi=str(tmp_path / "12.pt"), loss=loss, batch_size=32, epochs=6, lr=3e-3, warmup=10, out=str(tmp_path / "out"), cache=str(tmp_path / "cache"), workers=0))
    if loss == "softmax":
        assert entry["r5"] >= 2.5 * 100 * 5 / 60
    else:
        prior = np.log(32) + 31 * np.log(32 / 31)  # a row of 32 logits that are all log(1/31)
        assert entry["train_loss"] < prior - 0.02


def test_a_run_stuck_on_the_prior_is_warned_about(capsys, ptbxl, tiny, tmp_path):
    validator = train_pretrain.Validator.__new__(train_pretrain.Validator)
    validator.rows, validator.loss = np.arange(128), "paper"
    validator.warn(5.86)
    assert "nothing but the prior" in capsys.readouterr().out
    validator.warn(5.0)
    assert capsys.readouterr().out == ""
