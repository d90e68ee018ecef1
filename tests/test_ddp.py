"""Several processes are the same mathematics as one: real scripts under torchrun, gloo, the CPU."""

import json
import os
import time

import numpy as np
import pytest
import torch
from conftest import run, run_forked

import selfmis
import train_pretrain
import train_probe
from selfmis import UsageError
from train_probe import ProbeConfig


def losses(out):
    lines = map(json.loads, open(out / "log.jsonl"))
    return [line["train_loss"] for line in lines if "train_loss" in line]


def flags(ptbxl, tiny, batch):
    text = f"--data {ptbxl} --single {tiny[1]} --multi {tiny[12]} --epochs 2 --batch-size {batch}"
    text += " --lr 0.01 --loss learnable --save-seconds 0 --workers 0 --out out"
    return f"{text} --amp off".split()  # in bf16 another order of sums shows


def pretrain(folder, processes, ptbxl, tiny, batch, *more):
    """In this process, or in forks of it."""
    arguments = [*flags(ptbxl, tiny, batch), "--out", str(folder / "out"), *more]
    config = selfmis.parse_flags(train_pretrain.PretrainConfig, "", arguments)
    if processes == 1:
        train_pretrain.main(config)
    else:
        assert run_forked(processes, train_pretrain.main, config) == [0] * processes
    return folder / "out"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, ptbxl, tiny):
    return pretrain(tmp_path_factory.mktemp("alone"), 1, ptbxl, tiny, 30)


def assert_same_weights(one, many):
    one, many = (torch.load(folder / "last.pt", weights_only=True) for folder in (one, many))
    for key, value in one["model"].items():
        torch.testing.assert_close(many["model"][key], value, rtol=1e-4, atol=2e-5, msg=key)
    return one, many


def recalls(last):
    entry = last["last_entry"]
    return [entry["r1"], entry["r5"], entry["val_loss"]]


@pytest.mark.parametrize("processes", [2, 3])
def test_pretraining_ends_in_the_weights_of_one_process(tmp_path, alone, ptbxl, tiny, processes):
    """Losses, every weight, scale and bias, validation and retrieval (8 records: 3, 3 and 2).

    Two by torchrun, as a user starts them.  The pass is shared, with a list of marks a process.
    """
    if processes == 2:
        arguments = flags(ptbxl, tiny, 15)
        done = run("train_pretrain.py", *arguments, cwd=tmp_path, processes=2)
        assert done.returncode == 0 and "UserWarning" not in done.stderr, done.stderr
    else:
        pretrain(tmp_path, 3, ptbxl, tiny, 10)
    one, many = assert_same_weights(alone, tmp_path / "out")
    np.testing.assert_allclose(losses(tmp_path / "out"), losses(alone), rtol=1e-5)
    assert recalls(many) == pytest.approx(recalls(one), rel=1e-4)
    for name in ("signals", "targets"):
        lists = [np.fromfile(path, np.int64) for path in tmp_path.glob(f"cache/{name}-*.rows")]
        assert len(lists) == processes  # no two processes write into one
        assert len(np.concatenate(lists)) == len(np.unique(np.concatenate(lists))) == 72


def test_local_negatives_are_the_rows_of_one_process(tmp_path, ptbxl, tiny):
    """At a learning rate of almost 0 the encoder stays what it was."""
    more = "--local-negatives --loss paper --lr 1e-9 --epochs 1".split()
    [found] = losses(pretrain(tmp_path, 2, ptbxl, tiny, 15, *more))
    config = selfmis.parse_flags(train_pretrain.PretrainConfig, "", flags(ptbxl, tiny, 15))
    config.cache = str(tmp_path / "cache")
    cpu = torch.device("cpu")
    one = selfmis.Ranks(0, 1, 1, cpu)
    single, teacher, spec = train_pretrain.open_encoders(config)
    records = selfmis.find_records(str(ptbxl), sample_rate_hz=100)
    train, _ = train_pretrain.split(records, config, one)
    pairs = selfmis.read_pairs(config, records, train, spec, one, teacher)
    expected = []
    for rank in (0, 1):
        ranks = selfmis.Ranks(rank, 2, 2, cpu)
        for signals, targets in pairs.batches(selfmis.epoch_batches(train, config, 0, ranks)):
            embeddings = selfmis.embed(single, signals, cpu)
            expected.append(float(selfmis.siglip_loss(embeddings, targets)))
    assert len(expected) == 4  # of two processes and two steps
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_finetuning_ends_in_the_weights_of_one_process(tmp_path, ptbxl, tiny):
    settings = dict(data=[str(ptbxl)], encoder=tiny[1], finetune=True, lead="II", epochs=2)
    settings |= dict(workers=0, cache=str(tmp_path / "cache"))
    one, two = tmp_path / "one", tmp_path / "two"
    train_probe.main(ProbeConfig(out=str(one), batch_size=32, **settings))
    config = ProbeConfig(out=str(two), batch_size=16, **settings)
    assert run_forked(2, train_probe.main, config) == [0, 0]
    assert_same_weights(one, two)
    means = [json.loads((out / "results.json").read_text())["six"]["mean"] for out in (one, two)]
    assert means[0] == pytest.approx(means[1], abs=1e-3)


def test_gathered_rows_are_in_order_with_none_twice_and_none_lost():
    assert run_forked(3, gather, None) == [0, 0, 0]


def gather(_):
    ranks = selfmis.join_ranks("cpu", 0)
    assert (ranks.world_size, ranks.is_main) == (3, ranks.rank == 0)
    for n in (1, 3, 4, 5, 97):
        rows = torch.arange(2.0 * n).view(n, 2)
        assert torch.equal(ranks.gather_rows(rows[ranks.rank :: 3], n), rows)
    assert ranks.gather_objects(ranks.rank) == [0, 1, 2]


def test_processes_that_differ_are_refused_and_do_not_wait(ptbxl, mimic):
    """One with GPUs and one without; other precisions; other records under one name."""
    assert run_forked(2, differ_in_device, None) == [0, 0]
    assert run_forked(2, differ_in_more, [str(ptbxl), str(mimic)]) == [0, 0]


def differ_in_device(_):
    if os.environ["RANK"] == "1":
        torch.cuda.device_count = lambda: 2
        torch.cuda.set_device = lambda device: None
    with pytest.raises(UsageError) as error:
        selfmis.join_ranks("auto", 0)
    assert str(error.value) == "--device: processes have cpu and cuda; give one"
    if os.environ["RANK"] == "0":
        time.sleep(3)  # its traceback holds the store, which under torchrun outlives it


def differ_in_more(folders):
    ranks = selfmis.join_ranks("cpu", 0)
    amp, folder = ["bf16", "off"][ranks.rank], folders[ranks.rank]
    config = ProbeConfig(finetune=True, amp=amp, data=[folder])
    with pytest.raises(UsageError, match="the processes have bf16 and off; give one"):
        selfmis.Learner(torch.nn.Linear(1, 1), None, config, ranks)
    records = selfmis.gather_records(config, 100, 0)
    spec = selfmis.InputSpec("I", 100, {})
    with pytest.raises(UsageError, match="--data: not every machine sees the same records"):
        selfmis.read_pairs(config, records, np.arange(len(records)), spec, ranks)
