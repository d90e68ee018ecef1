"""Several processes are the same mathematics as one: the real scripts under torchrun, gloo, on the CPU."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import TINY, run

import selfmis


def losses(out):
    return [line["train_loss"] for line in map(json.loads, open(out / "log.jsonl")) if "train_loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, ptbxl, tiny):
    folder = tmp_path_factory.mktemp("alone")
    assert pretrain(folder, ptbxl, tiny, 0, 32).returncode == 0
    return folder / "out"


def pretrain(folder, ptbxl, tiny, processes, batch, *more):
    return run(
        "train_pretrain.py", "--data", ptbxl, "--single", tiny[1], "--multi", tiny[12], "--epochs", 2, "--batch-size", batch,
        "--lr", 0.01, "--loss", "learnable", "--save-seconds", 0, "--workers", 0, "--out", "out", *more, cwd=folder, processes=processes,
    )  # fmt: skip


@pytest.mark.parametrize("processes", [2, 4])
def test_pretraining_ends_in_the_weights_of_one_process(tmp_path, alone, ptbxl, tiny, processes):
    """Losses, every weight, scale and bias, validation and retrieval; the pass and the evaluation shared unevenly (8 records)."""
    done = pretrain(tmp_path, ptbxl, tiny, processes, 32 // processes)
    assert done.returncode == 0 and "UserWarning" not in done.stderr, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "out"), losses(alone), rtol=1e-5)
    one, many = (torch.load(out / "last.pt", weights_only=True) for out in (alone, tmp_path / "out"))
    for key, value in one["model"].items():
        torch.testing.assert_close(many["model"][key], value, rtol=1e-4, atol=2e-5, msg=key)
    assert {k: v for k, v in many["entry"].items() if k.startswith("r") and k[1:].isdigit()} == {k: v for k, v in one["entry"].items() if k.startswith("r") and k[1:].isdigit()}
    assert many["entry"]["val_loss"] == pytest.approx(one["entry"]["val_loss"], rel=1e-4)


def test_local_negatives_are_another_loss(tmp_path, alone, ptbxl, tiny):
    done = pretrain(tmp_path, ptbxl, tiny, 2, 16, "--local-negatives")
    assert done.returncode == 0, done.stderr
    assert not np.allclose(losses(tmp_path / "out"), losses(alone), rtol=0.05)


def test_finetuning_ends_in_the_weights_of_one_process(tmp_path, ptbxl, tiny):
    for processes in (0, 2):
        done = run(
            "train_probe.py", "--data", ptbxl, "--encoder", tiny[1], "--finetune", "--lead", "II", "--epochs", 2, "--batch-size", 32 // max(1, processes),
            "--workers", 0, "--out", f"out{processes}", cwd=tmp_path, processes=processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"out{p}" / "last.pt", weights_only=True)["model"] for p in (0, 2))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=2e-5, msg=key)


def test_an_error_is_said_once_and_every_process_ends(tmp_path, ptbxl):
    done = run("train_pretrain.py", "--data", ptbxl, "--out", "out", cwd=tmp_path, processes=2)
    assert done.returncode != 0 and done.stderr.count("error: --multi: alignment needs a 12-lead teacher") == 1
    assert "Traceback (most recent call last):\n  File \"" + str(selfmis.Path(selfmis.__file__).parent) not in done.stderr


def test_gathered_rows_are_in_order_with_none_twice_and_none_lost(tmp_path):
    torch.multiprocessing.spawn(gather, (str(tmp_path / "store"),), nprocs=3)


def gather(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    ranks = selfmis.Ranks(rank, 3, rank, 3, torch.device("cpu"))
    for n in (1, 3, 4, 5, 97):
        rows = torch.arange(2.0 * n).view(n, 2)
        assert torch.equal(ranks.gather_rows(rows[rank::3], n), rows)
    os._exit(0)  # not through Python's end, where a thread of gloo may still live and abort the process


def test_tiny_is_tiny():
    assert sum(p.numel() for p in selfmis.ResNet1D(1, **TINY).parameters()) < 30_000
