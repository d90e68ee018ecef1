"""An interrupted run, resumed, is the uninterrupted run: bit for bit, weights and log."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import selfmis
import train_pretrain
from selfmis import UsageError
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain
from train_probe import ProbeConfig
from train_probe import main as probe


def settings(tmp_path, ptbxl, tiny, out="out", **changed):
    defaults = dict(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], epochs=3, batch_size=16)
    defaults |= dict(lr=0.01, loss="learnable", workers=0, cache=str(tmp_path / "cache"))
    return PretrainConfig(out=str(tmp_path / out), **defaults | changed)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def state(folder):
    last = torch.load(folder / "out/last.pt", weights_only=True)
    return {key: last[key] for key in ("model", "optimizer", "epoch", "step", "best")}


def epochs(folder):
    """The log's line of each whole epoch, the last where there are several, without its speed."""
    found = {}
    for line in map(json.loads, open(folder / "out/log.jsonl")):
        line.pop("records_per_second", None)
        if "val_loss" in line:
            found[line["epoch"]] = {key: round(value, 5) for key, value in line.items()}
    return list(found.values())


def weights(folder):
    return torch.load(folder / "out/best.pt", weights_only=True)["encoder"]


def is_the_same_run(a, b):
    """Progress, weights, optimizer, the best encoder and the log."""
    return same(state(a), state(b)) and epochs(a) == epochs(b) and same(weights(a), weights(b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ptbxl, tiny):
    folder = tmp_path_factory.mktemp("whole")
    pretrain(settings(folder, ptbxl, tiny))
    return folder


def interrupt(monkeypatch, owner, name, when):
    """KeyboardInterrupt after call number `when` (from 1) of owner.name."""
    calls = []
    real = getattr(owner, name)

    def interrupted(*arguments, **more):
        result = real(*arguments, **more)
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("stop_at", [1, 3, 5, 9])
def test_pretraining_stopped_at_any_step_resumes_bit_for_bit(
    tmp_path, whole, ptbxl, tiny, monkeypatch, stop_at
):
    """Four steps an epoch: stops in the first, before and after its end, and in the last."""
    interrupt(monkeypatch, train_pretrain, "all_targets", stop_at + 1)
    monkeypatch.setattr(train_pretrain, "STEPS_PER_LOSS", 1)  # and saves after every step
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(tmp_path, ptbxl, tiny, save_seconds=0.0))
    monkeypatch.undo()
    step = torch.load(tmp_path / "out/last.pt", weights_only=True)["step"]
    assert step == stop_at % 4
    pretrain(settings(tmp_path, ptbxl, tiny, resume=True))
    assert is_the_same_run(tmp_path, whole)


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_pretraining_stopped_between_its_files_resumes_bit_for_bit(
    tmp_path, whole, ptbxl, tiny, monkeypatch, saves
):
    """best.pt and last.pt of an epoch; the log has its line already."""
    interrupt(monkeypatch, selfmis, "save", saves)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(tmp_path, ptbxl, tiny))
    monkeypatch.undo()
    pretrain(settings(tmp_path, ptbxl, tiny, resume=True))
    assert is_the_same_run(tmp_path, whole)


@pytest.mark.parametrize("removed", [1, 2, 3])
def test_a_run_stopped_while_it_replaces_another_can_be_started_again(
    tmp_path, whole, ptbxl, tiny, monkeypatch, removed
):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    calls = []
    real = Path.unlink

    def unlink(path, *arguments, **more):
        real(path, *arguments, **more)
        calls.append(path)
        if len([path for path in calls if path.name in selfmis.RUN_FILES]) == removed:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(tmp_path, ptbxl, tiny, overwrite=True, epochs=1))
    monkeypatch.undo()
    pretrain(settings(tmp_path, ptbxl, tiny, overwrite=True))
    assert is_the_same_run(tmp_path, whole)


def test_sigkill_at_twenty_random_moments(tmp_path, whole, ptbxl, tiny, monkeypatch):
    """The pass, steps, validation and saving: whatever is killed, the next start goes on."""
    monkeypatch.setattr(train_pretrain, "STEPS_PER_LOSS", 1)
    fork, rng, kills = multiprocessing.get_context("fork"), np.random.default_rng(0), 0

    def make():
        return settings(tmp_path, ptbxl, tiny, save_seconds=0.0, resume=True)

    def finish():
        pretrain(make())
        assert is_the_same_run(tmp_path, whole)
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "cache")

    started = time.perf_counter()
    finish()
    takes = time.perf_counter() - started  # on this machine, so that the moments lie within a run
    for _ in range(200):
        process = fork.Process(target=pretrain, args=(make(),))
        process.start()
        process.join(takes * rng.uniform(0.05, 0.6))
        killed = process.is_alive()
        process.kill()
        process.join()
        kills += killed
        if not killed:
            finish()  # that one came to its end: the next begins anew
        if kills == 20:
            break
    assert kills == 20
    finish()


def test_resuming_a_finished_run_says_so_and_an_empty_folder_starts(
    tmp_path, whole, ptbxl, tiny, capsys
):
    pretrain(settings(whole, ptbxl, tiny, resume=True))
    assert "finished already" in capsys.readouterr().out
    pretrain(settings(tmp_path, ptbxl, tiny, resume=True, epochs=1))
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["epoch"] == 1
    sentence = f"--resume: there is no {tmp_path / 'out/last.pt'}, so the run starts\n"
    assert sentence in capsys.readouterr().out


def test_resuming_with_other_settings_is_refused_and_named(whole, ptbxl, tiny):
    with pytest.raises(UsageError, match="was started with --lr 0.01"):
        pretrain(settings(whole, ptbxl, tiny, resume=True, lr=0.02))
    with pytest.raises(UsageError, match="was started with 1 processes x 16 records; keep"):
        pretrain(settings(whole, ptbxl, tiny, resume=True, batch_size=8))
    with pytest.raises(UsageError, match="was started with --seed 0, this is --seed 1"):
        pretrain(settings(whole, ptbxl, tiny, resume=True, seed=1))


@pytest.mark.parametrize("fold", ["training", "validation"])
def test_resuming_with_other_records_is_refused(tmp_path, ptbxl, tiny, monkeypatch, fold):
    root = tmp_path / "ptb-xl"
    shutil.copytree(ptbxl, root)
    interrupt(monkeypatch, selfmis, "save", 2)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(tmp_path, root, tiny, cache="none"))
    monkeypatch.undo()
    number = 8 if fold == "validation" else 0  # record i lies in fold i % 10 + 1
    os.remove(root / f"records100/00000/{number:05}_lr.dat")
    with pytest.raises(UsageError, match="other records can be read now than at the start"):
        pretrain(settings(tmp_path, root, tiny, cache="none", resume=True))


def test_a_machine_that_does_not_see_the_run_is_refused(whole, ptbxl, tiny, monkeypatch):
    config = settings(whole, ptbxl, tiny, resume=True)
    two = selfmis.Ranks(0, 2, 1, torch.device("cpu"), "a group")
    both = [(True, True), (False, False)]  # best.pt and last.pt, as each machine sees them
    monkeypatch.setattr(selfmis.Ranks, "gather_objects", lambda ranks, mine: both)
    with pytest.raises(UsageError, match="not every machine sees it; give a shared folder"):
        selfmis.read_last(config, whole / "out", two)


def test_the_encoder_stands_in_the_file_once(whole):
    weights = torch.load(whole / "out/last.pt", weights_only=True)["model"]
    numbers = sum(value.numel() for value in weights.values())
    # Weights and two moments of AdamW, four bytes each.
    assert (whole / "out/last.pt").stat().st_size < 4 * 4 * numbers


def finetuning(folder, ptbxl, tiny, **more):
    shared = dict(data=[str(ptbxl)], encoder=tiny[1], finetune=True, epochs=3, batch_size=16)
    return ProbeConfig(out=str(folder / "out"), workers=0, **shared | more)


@pytest.fixture(scope="module")
def whole_finetuning(tmp_path_factory, ptbxl, tiny):
    folder = tmp_path_factory.mktemp("finetuning")
    probe(finetuning(folder, ptbxl, tiny))
    return folder


@pytest.mark.parametrize("saves", [1, 3])
def test_finetuning_resumes_bit_for_bit(
    tmp_path, whole_finetuning, ptbxl, tiny, monkeypatch, saves
):
    interrupt(monkeypatch, selfmis, "save", saves)
    with pytest.raises(KeyboardInterrupt):
        probe(finetuning(tmp_path, ptbxl, tiny))
    monkeypatch.undo()
    probe(finetuning(tmp_path, ptbxl, tiny, resume=True))
    a, b = (
        torch.load(folder / "out/last.pt", weights_only=True)
        for folder in (whole_finetuning, tmp_path)
    )
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])
    one, other = (
        json.loads((folder / "out/results.json").read_text())["runs"]
        for folder in (whole_finetuning, tmp_path)
    )
    assert one == other


@pytest.mark.parametrize("moment", ["open", "fsync", "replace"])
def test_a_full_disk_while_saving_leaves_the_older_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "last.pt"
    selfmis.save(path, {"step": 1})

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if moment == "open":
        monkeypatch.setattr(selfmis, "open", fail, raising=False)
    else:
        monkeypatch.setattr(os, moment, fail)
    message = r"last.pt: cannot be written \(No space left on device\)"
    with pytest.raises(UsageError, match=message):
        selfmis.save(path, {"step": 2})
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(
    tmp_path, whole, ptbxl, tiny, monkeypatch
):
    count = []

    def loss(self, *arguments, real=selfmis.SelfMIS.loss):
        count.append(1)
        # 4 steps + 1 validation batch, then step 2
        return real(self, *arguments) * (float("nan") if len(count) == 7 else 1)

    monkeypatch.setattr(selfmis.SelfMIS, "loss", loss)
    message = r"nan at epoch 2, step 2 \(records .*_lr.*--overwrite and a lower --lr"
    with pytest.raises(UsageError, match=message):
        pretrain(settings(tmp_path, ptbxl, tiny))
    monkeypatch.undo()
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["epoch"] == 1
    pretrain(settings(tmp_path, ptbxl, tiny, resume=True))
    assert is_the_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    "mine, message",
    [(1.0, r"step 1; what"), (float("inf"), r"step 1 \(records record 7 ...\); what")],
)
def test_the_records_of_a_loss_that_is_not_finite_are_named_by_their_own_process_only(
    monkeypatch, mine, message
):
    """What the others sent makes the mean NaN as well."""
    dist = train_pretrain.dist
    monkeypatch.setattr(dist, "all_reduce", lambda losses: losses.fill_(float("nan")))
    pairs = SimpleNamespace(
        dataset=SimpleNamespace(records=SimpleNamespace(name="record {}".format))
    )
    ranks = selfmis.Ranks(1, 2, 2, torch.device("cpu"), "a group")
    training = SimpleNamespace(ranks=ranks, pairs=pairs, step=1, epoch=0)
    with pytest.raises(UsageError, match=message):
        train_pretrain.read_losses(training, [([7], torch.tensor(mine))])


def test_a_run_goes_on_under_another_name_of_its_precision_but_not_under_another(
    tmp_path, ptbxl, tiny
):
    auto = selfmis.choose_amp("auto", torch.device("cpu"))
    other = "off" if auto == "bf16" else "bf16"
    pretrain(settings(tmp_path, ptbxl, tiny, epochs=1))
    pretrain(settings(tmp_path, ptbxl, tiny, epochs=1, resume=True, amp=auto))
    last = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert last["amp"] == auto
    torch.save(last | dict(amp=other, epoch=0), tmp_path / "out/last.pt")
    with pytest.raises(UsageError, match=f"started with --amp {other}; give that"):
        pretrain(settings(tmp_path, ptbxl, tiny, epochs=1, resume=True))
    pretrain(settings(tmp_path, ptbxl, tiny, epochs=1, resume=True, amp=other))


# --------------------------------------------------------------------------------------------------
# Restarts by torchrun
# --------------------------------------------------------------------------------------------------


def flags(ptbxl, tiny, *more):
    text = f"--data {ptbxl} --single {tiny[1]} --multi {tiny[12]} --epochs 3 --batch-size 8"
    return f"{text} --lr 0.01 --loss learnable --workers 0 --out out".split() + list(more)


@pytest.mark.parametrize("more", [dict(), dict(overwrite=True, batch_size=3200)])
def test_a_restart_goes_on_with_nothing_but_what_its_own_torchrun_began(
    tmp_path, whole, ptbxl, tiny, monkeypatch, more
):
    shutil.copytree(whole / "out", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(selfmis, "launcher", lambda: "another torchrun")
    with pytest.raises(UsageError, match="holds a run|do not fill a batch"):
        pretrain(settings(tmp_path, ptbxl, tiny, **more))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    entry = pretrain(settings(tmp_path, ptbxl, tiny, overwrite=True))  # means --resume
    assert entry["epoch"] == 3 and is_the_same_run(tmp_path, whole)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def under_torchrun(config, refused):
    """What each process does that the agent starts: rank 0 dies once, in its second epoch."""

    def save(path, content, real=selfmis.save, saves=[]):  # noqa: B006
        real(path, content)
        saves.append(path)
        if len(saves) == 3 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        selfmis.save = save
    try:
        selfmis.open_run(refused)
    except UsageError as error:
        print("refused:", error, flush=True)
    pretrain(config)


def launch(config, refused):
    """torchrun --max-restarts 1, with processes that need not import torch first."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    two = dict(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, run_id="test")
    two |= dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    elastic_launch(LaunchConfig(**two), under_torchrun)(config, refused)


def test_torchrun_restarts_a_worker_that_died_and_the_run_recovers(
    tmp_path, whole, ptbxl, tiny, capfd
):
    """It replaces another run, kills itself in its second epoch and is started again.

    The same flags then mean --resume, and not --overwrite once more.  A run that this torchrun did
    not begin is refused at first and after the restart, and not touched.
    """
    shutil.copytree(whole / "out", tmp_path / "out")
    changed = dict(seed=1, overwrite=True, amp="off")  # in bf16 another order of sums shows
    config = settings(tmp_path, ptbxl, tiny, batch_size=8, **changed)
    refused = PretrainConfig(out=str(whole / "out"))
    before = {path.name: path.read_bytes() for path in (whole / "out").iterdir()}
    agent = multiprocessing.get_context("fork").Process(target=launch, args=(config, refused))
    agent.start()
    agent.join(60)
    agent.terminate()  # if it hangs
    agent.join()
    text = capfd.readouterr().out
    assert agent.exitcode == 0
    assert text.count(f"refused: --out {whole / 'out'}: holds a run; give another") == 4
    assert text.count("going on at epoch 2, step 1") == 1
    assert [entry["epoch"] for entry in epochs(tmp_path)] == [1, 2, 3]
    assert before == {path.name: path.read_bytes() for path in (whole / "out").iterdir()}
    pretrain(settings(tmp_path, ptbxl, tiny, out="alone/out", seed=1, amp="off"))
    for key, value in state(tmp_path / "alone")["model"].items():
        torch.testing.assert_close(state(tmp_path)["model"][key], value, rtol=1e-4, atol=2e-5)
