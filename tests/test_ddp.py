"""Several processes are the same mathematics as one: real scripts under torchrun, gloo, the CPU."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import TINY, run

import selfmis
import train_pretrain
import train_probe


def losses(out):
    lines = map(json.loads, open(out / "log.jsonl"))
    return [line["train_loss"] for line in lines if "train_loss" in line]


def flags(ptbxl, tiny, batch):
    text = f"--data {ptbxl} --single {tiny[1]} --multi {tiny[12]} --epochs 2 --batch-size {batch}"
    return f"{text} --lr 0.01 --loss learnable --save-seconds 0 --workers 0 --out out".split()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, ptbxl, tiny):
    folder = tmp_path_factory.mktemp("alone")
    config = selfmis.parse_flags(train_pretrain.PretrainConfig, "", flags(ptbxl, tiny, 32))
    config.out = str(folder / "out")
    train_pretrain.main(config)
    return folder / "out"


def recalls(last):
    entry = last["last_entry"]
    return [entry["r1"], entry["r5"], entry["val_loss"]]


@pytest.mark.parametrize("processes", [2, 4])
def test_pretraining_ends_in_the_weights_of_one_process(tmp_path, alone, ptbxl, tiny, processes):
    """Losses, every weight, scale and bias, validation and retrieval; and a mark list a process."""
    arguments = flags(ptbxl, tiny, 32 // processes)
    done = run("train_pretrain.py", *arguments, cwd=tmp_path, processes=processes)
    assert done.returncode == 0 and "UserWarning" not in done.stderr, done.stderr
    out = tmp_path / "out"
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-5)
    one, many = (torch.load(folder / "last.pt", weights_only=True) for folder in (alone, out))
    for key, value in one["model"].items():
        torch.testing.assert_close(many["model"][key], value, rtol=1e-4, atol=2e-5, msg=key)
    assert recalls(many) == pytest.approx(recalls(one), rel=1e-4)
    for name in ("signals", "targets"):
        lists = [np.fromfile(path, np.int64) for path in tmp_path.glob(f"cache/{name}-*.rows")]
        assert len(lists) == processes  # no two processes write into one
        assert len(np.concatenate(lists)) == len(np.unique(np.concatenate(lists))) == 72


def test_local_negatives_are_another_loss(tmp_path, alone, ptbxl, tiny):
    arguments = [*flags(ptbxl, tiny, 16), "--local-negatives"]
    done = run("train_pretrain.py", *arguments, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert not np.allclose(losses(tmp_path / "out"), losses(alone), rtol=0.05)


def test_finetuning_ends_in_the_weights_of_one_process(tmp_path, ptbxl, tiny):
    settings = f"--data {ptbxl} --encoder {tiny[1]} --finetune --lead II --epochs 2 --workers 0"
    settings = settings.split()
    alone = [*settings, "--batch-size", "32", "--out", str(tmp_path / "one")]
    train_probe.main(selfmis.parse_flags(train_probe.ProbeConfig, "", alone))
    arguments = [*settings, "--batch-size", 16, "--out", "two"]
    done = run("train_probe.py", *arguments, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-4, atol=2e-5, msg=key)
    one, two = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two"))
    assert two["diagnostic"]["mean"] == pytest.approx(one["diagnostic"]["mean"], abs=1e-3)


def test_gathered_rows_are_in_order_with_none_twice_and_none_lost(tmp_path):
    torch.multiprocessing.spawn(gather, (str(tmp_path / "store"),), nprocs=3)


def gather(rank, store):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=3
    )
    ranks = selfmis.Ranks(rank, 3, 3, torch.device("cpu"))
    for n in (1, 3, 4, 5, 97):
        rows = torch.arange(2.0 * n).view(n, 2)
        assert torch.equal(ranks.gather_rows(rows[rank::3], n), rows)
    assert ranks.gather_objects(rank) == [0, 1, 2]
    # Not through Python's end, where a thread of gloo may still live and abort the process.
    os._exit(0)


def test_tiny_is_tiny():
    assert sum(p.numel() for p in selfmis.ResNet1D(1, **TINY).parameters()) < 30_000
