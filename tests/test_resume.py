"""An interrupted run, resumed, is the uninterrupted run: bit for bit, in the weights, the optimiser and the log."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HERE, run

import selfmis
import train_pretrain
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain
from train_probe import ProbeConfig
from train_probe import main as probe


def settings(tmp_path, ptbxl, tiny, out="out", **changed):
    defaults = dict(data=[str(ptbxl)], single=tiny[1], multi=tiny[12], epochs=3, batch_size=16, lr=0.01, loss="learnable", workers=0, cache=str(tmp_path / "cache"))
    return PretrainConfig(out=str(tmp_path / out), **defaults | changed)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def state(tmp_path, out):
    last = torch.load(tmp_path / out / "last.pt", weights_only=True)
    return {key: last[key] for key in ("model", "optimizer", "epoch", "step", "best")}


def epochs(folder):
    """The log's lines of whole epochs, without their speed."""
    lines = map(json.loads, open(folder / "out/log.jsonl"))
    return [{k: round(v, 5) for k, v in line.items() if k != "records_per_second"} for line in lines if "val_loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ptbxl, tiny):
    folder = tmp_path_factory.mktemp("whole")
    pretrain(settings(folder, ptbxl, tiny))
    return folder


@pytest.mark.parametrize("stop_at", [1, 3, 5, 9])
def test_pretraining_stopped_at_any_step_resumes_bit_for_bit(tmp_path, whole, ptbxl, tiny, monkeypatch, stop_at):
    """Four steps an epoch: stops in the first epoch, before and after its end, and in the last; saving after every step."""
    steps = []

    def all_targets(*arguments, real=sys.modules["train_pretrain"].all_targets):
        steps.append(1)
        if len(steps) > stop_at:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr("train_pretrain.all_targets", all_targets)
    monkeypatch.setattr("train_pretrain.LOSSES_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(tmp_path, ptbxl, tiny, save_seconds=0.0))
    monkeypatch.undo()
    pretrain(settings(tmp_path, ptbxl, tiny, resume=True))
    assert same(state(tmp_path, "out"), state(whole, "out")) and epochs(tmp_path) == epochs(whole)


def test_sigkill_at_twenty_random_moments(tmp_path, whole, ptbxl, tiny, monkeypatch):
    """The pass over the records, steps, validation and checkpoint writing: whatever is killed, the next start goes on."""
    monkeypatch.setattr("train_pretrain.LOSSES_AT_ONCE", 1)
    fork, rng, kills = multiprocessing.get_context("fork"), np.random.default_rng(0), 0
    make = lambda: settings(tmp_path, ptbxl, tiny, save_seconds=0.0, resume=True)

    def finish():
        pretrain(make())
        assert same(state(tmp_path, "out"), state(whole, "out")) and epochs(tmp_path) == epochs(whole)
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


def test_resuming_a_finished_run_says_so_and_an_empty_folder_starts(tmp_path, whole, ptbxl, tiny, capsys):
    pretrain(settings(whole, ptbxl, tiny, resume=True))
    assert "finished already" in capsys.readouterr().out
    pretrain(settings(tmp_path, ptbxl, tiny, resume=True, epochs=1))
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["epoch"] == 1


def test_resuming_with_other_settings_is_refused_and_named(whole, ptbxl, tiny):
    with pytest.raises(ValueError, match="--lr 0.02, not 0.01"):
        pretrain(settings(whole, ptbxl, tiny, resume=True, lr=0.02))
    with pytest.raises(ValueError, match="--batch-size x processes 8, not 16"):
        pretrain(settings(whole, ptbxl, tiny, resume=True, batch_size=8))


def test_a_second_run_is_refused_and_overwrite_removes_only_a_run(tmp_path, ptbxl, tiny):
    pretrain(settings(tmp_path, ptbxl, tiny, epochs=1))
    (tmp_path / "out/notes.txt").write_text("mine")
    before = (tmp_path / "out/last.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run already.*--overwrite"):
        pretrain(settings(tmp_path, ptbxl, tiny, epochs=1))
    assert (tmp_path / "out/last.pt").read_bytes() == before
    pretrain(settings(tmp_path, ptbxl, tiny, epochs=1, seed=1, overwrite=True))
    assert (tmp_path / "out/notes.txt").read_text() == "mine" and (tmp_path / "out/last.pt").read_bytes() != before


def test_finetuning_resumes_bit_for_bit(tmp_path, ptbxl, tiny, monkeypatch):
    make = lambda out, **more: ProbeConfig(data=[str(ptbxl)], encoder=tiny[1], finetune=True, epochs=3, batch_size=16, workers=0, cache=str(tmp_path / "cache"), out=str(tmp_path / out), **more)
    probe(make("a"))
    real, saves = selfmis.save, []

    def save(path, content):
        real(path, content)
        saves.append(path.name)
        if saves.count("last.pt") == 1 and path.name == "last.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(selfmis, "save", save)
    with pytest.raises(KeyboardInterrupt):
        probe(make("b"))
    monkeypatch.undo()
    probe(make("b", resume=True))
    a, b = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in "ab")
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])
    runs = [json.loads((tmp_path / out / "results.json").read_text())["runs"] for out in "ab"]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_kill_or_full_disk_while_saving_leaves_the_older_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "last.pt"
    selfmis.save(path, {"step": 1})

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch if moment == "write" else os, "save" if moment == "write" else "replace", fail)
    with pytest.raises(OSError):
        selfmis.save(path, {"step": 2})
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(tmp_path, ptbxl, tiny, monkeypatch):
    pretrain(settings(tmp_path, ptbxl, tiny, epochs=3, out="good"))
    count = []

    def compare(self, *arguments, real=selfmis.SelfMIS.compare, **more):
        count.append(1)
        return real(self, *arguments, **more) * (float("nan") if len(count) == 7 else 1)  # 4 steps + 1 validation batch, then step 2

    monkeypatch.setattr(selfmis.SelfMIS, "compare", compare)
    with pytest.raises(FloatingPointError, match=r"nan at epoch 2, step 2 \(records .*_lr.*--overwrite and a lower --lr"):
        pretrain(settings(tmp_path, ptbxl, tiny))
    monkeypatch.undo()
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["epoch"] == 1
    pretrain(settings(tmp_path, ptbxl, tiny, resume=True))
    assert same(state(tmp_path, "out"), state(tmp_path, "good"))


def test_the_records_of_a_loss_that_is_not_finite_are_named_by_their_own_process_only(monkeypatch):
    """What the others sent makes the mean NaN as well."""
    monkeypatch.setattr(train_pretrain.dist, "all_reduce", lambda losses: losses.fill_(float("nan")))
    pairs = SimpleNamespace(dataset=SimpleNamespace(records=SimpleNamespace(name="record {}".format)))
    for mine, said in ((1.0, r"step 1; last.pt"), (float("inf"), r"step 1 \(records record 7 ...\); last.pt")):
        with pytest.raises(FloatingPointError, match=said):
            train_pretrain.read_losses([([7], torch.tensor(mine))], pairs, dict(step=1, epoch=0), selfmis.Ranks(1, 2, 1, 2, torch.device("cpu")))


def test_a_run_goes_on_under_another_name_of_its_precision_but_not_under_another(tmp_path, ptbxl, tiny):
    """On a CPU auto is off."""
    pretrain(settings(tmp_path, ptbxl, tiny, epochs=1))
    pretrain(settings(tmp_path, ptbxl, tiny, epochs=1, resume=True, amp="off"))
    last = torch.load(tmp_path / "out/last.pt", weights_only=True)
    torch.save(last | dict(amp="bf16", epoch=0), tmp_path / "out/last.pt")
    with pytest.raises(ValueError, match="started with --amp bf16, here it would be off; give --amp bf16"):
        pretrain(settings(tmp_path, ptbxl, tiny, epochs=1, resume=True))
    pretrain(settings(tmp_path, ptbxl, tiny, epochs=1, resume=True, amp="bf16"))


def test_a_restart_by_torchrun_does_not_let_in_what_was_refused(tmp_path, ptbxl, tiny):
    pretrain(settings(tmp_path, ptbxl, tiny, epochs=1))
    before = (tmp_path / "out/last.pt").read_bytes()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1", str(HERE / "train_pretrain.py")]
    command += ["--data", str(ptbxl), "--single", tiny[1], "--multi", tiny[12], "--epochs", "1", "--batch-size", "8", "--lr", "0.01", "--loss", "learnable", "--workers", "0", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150)
    assert done.returncode != 0 and "holds a run already" in done.stderr and "finished already" not in done.stdout
    assert (tmp_path / "out/last.pt").read_bytes() == before


def test_torchrun_restarts_a_worker_that_died_and_the_run_recovers(tmp_path, whole, ptbxl, tiny):
    """The worker kills itself once, in its second epoch; --max-restarts starts it again without --resume on the command line."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import selfmis, train_pretrain\n"
        "if not int(os.environ['TORCHELASTIC_RESTART_COUNT']):\n"
        "    real, saves = selfmis.save, []\n"
        "    def save(path, content):\n"
        "        real(path, content)\n"
        "        saves.append(path)\n"
        "        if len(saves) == 3 and os.environ['RANK'] == '0':\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    selfmis.save = save\n"
        "selfmis.run_script(train_pretrain.main, train_pretrain.PretrainConfig, '')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "2", str(driver)]
    command += ["--data", str(ptbxl), "--single", tiny[1], "--multi", tiny[12], "--epochs", "3", "--batch-size", "8", "--lr", "0.01", "--loss", "learnable", "--workers", "0", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and "going on at epoch" in done.stdout, done.stderr[-2000:]
    a, b = state(tmp_path, "out")["model"], state(whole, "out")["model"]
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=2e-5)


def test_help_of_both_scripts_shows_defaults(tmp_path):
    for script in ("train_pretrain.py", "train_probe.py"):
        done = run(script, "--help", cwd=tmp_path)
        assert done.returncode == 0 and "(default: 20)" in done.stdout and "--val-fold" in done.stdout
