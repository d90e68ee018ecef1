"""What several tests share: tiny collections of made-up ECG as users have them, tiny encoders."""

import contextlib
import csv
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

# Many short processes, and some that are forked, which hang where threads have been at work.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
import torch

import selfmis
from extras.synthetic import synthesize

HERE = Path(__file__).parents[1]
TINY = dict(stem=16, widths=(16, 32), depths=(1, 1))
MIMIC_ORDER = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")
PTBXL_NAMES = tuple(name.upper() if name.startswith("a") else name for name in selfmis.LEADS)


def pytest_configure(config):
    extras = [f"extras.{file.stem}" for file in (HERE / "extras").glob("*.py")]
    for module in ("selfmis", "train_pretrain", "train_probe", *extras):
        config.addinivalue_line("filterwarnings", f"error:::{module}")


def write_record(stem, ecg, names=selfmis.LEADS, rate=100, unit="mV", adu=1000):
    """(L, T) mV as a WFDB record, format 16, `adu` steps a unit."""
    import wfdb

    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    scale = {"mV": 1, "uV": 1e3, "V": 1e-3}[unit]
    n = len(names)
    digital = np.rint(np.where(np.isfinite(ecg), ecg, 0).T * scale * adu).astype(np.int64)
    digital[~np.isfinite(ecg.T)] = -32768  # format 16's mark of an invalid sample
    wfdb.wrsamp(
        stem.name,
        rate,
        [unit] * n,
        list(names),
        d_signal=digital,
        fmt=["16"] * n,
        adc_gain=[adu] * n,
        baseline=[0] * n,
        write_dir=str(stem.parent),
    )


def made_up(n, rate=100, seconds=10.0, seed=0):
    """(n, 12, T) mV and labels (n, 44)."""
    return synthesize(n, seed, sample_rate_hz=rate, seconds=seconds)


@pytest.fixture(scope="session")
def ptbxl(tmp_path_factory):
    """80 records in PTB-XL's layout (records100), eight a fold, a patient each.

    Every fold has every label of `labels`.
    """
    root = tmp_path_factory.mktemp("ptb-xl")
    x, _ = made_up(80)
    labels = ("NORM", "IMI", "ASMI", "ALMI", "AMI", "ILMI", "LMI", "PMI")
    columns = "ecg_id patient_id scp_codes strat_fold filename_lr filename_hr".split()
    with open(root / "ptbxl_database.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for i in range(80):
            low, high = (f"records{rate}/00000/{i:05}" for rate in (100, 500))
            write_record(root / f"{low}_lr", x[i], PTBXL_NAMES)
            likelihood = 0.0 if i % 2 else 15.0  # 0: not said
            codes = str({labels[i // 10]: likelihood, "SR": 0.0})
            table.writerow([i, float(i + 1000), codes, i % 10 + 1, f"{low}_lr", f"{high}_hr"])
    return root


@pytest.fixture(scope="session")
def mimic(tmp_path_factory):
    """48 records in MIMIC-IV-ECG's layout: 200 steps a mV, aVF before aVL."""
    root = tmp_path_factory.mktemp("mimic-iv-ecg")
    x, _ = made_up(48, seed=5)
    order = [selfmis.LEADS.index(name) for name in MIMIC_ORDER]
    with open(root / "record_list.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["subject_id", "study_id", "file_name", "ecg_time", "path"])
        for i in range(48):
            patient = 10000000 + i // 2
            path = f"files/p1000/p{patient}/s{i}/{i}"
            write_record(root / path, x[i][order], MIMIC_ORDER, adu=200)
            table.writerow([patient, i, f"{i}.dat", "2100-01-01 00:00:00", path])
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """{leads: checkpoint of a tiny random encoder at 100 Hz} as a user's own encoder would be."""
    folder = tmp_path_factory.mktemp("encoders")
    paths = {}
    for leads, lead in ((1, "I"), (12, "all")):
        torch.manual_seed(leads)
        spec = selfmis.InputSpec(lead, 100, {"normalize": "zscore", "filter": "none"})
        content = selfmis.encoder_content(selfmis.ResNet1D(leads, **TINY), spec, [])
        content["lead"] = None if leads == 1 else lead  # so that --lead is free
        paths[leads] = str(folder / f"{leads}.pt")
        selfmis.save(Path(paths[leads]), content)
    return paths


def spy(monkeypatch, owner, name):
    """A list that gets (arguments, result) of each call of owner.name."""
    function, calls = getattr(owner, name), []

    def spied(*arguments, **named):
        calls.append((arguments, function(*arguments, **named)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, spied)
    return calls


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def run(script, *arguments, cwd, processes=0, restarts=0, timeout=150, env=None):
    """A script as a user starts it; returns the finished process with its text."""
    launcher = [sys.executable]
    if processes:
        launcher = [*TORCHRUN, str(processes), "--max_restarts", str(restarts)]
    command = [*launcher, str(HERE / script), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=env
    )


def run_forked(processes, main, config):
    """main(config) in as many processes, as torchrun starts them, without its imports.

    Returns their exit codes.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run_rank(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_PORT": str(port)}
        main(config)
        # Not through Python's end, where a thread of gloo may still live and abort the process.
        os._exit(0)

    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=run_rank, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


@contextlib.contextmanager
def stopped_after_an_epoch(monkeypatch):
    """What runs inside is interrupted as soon as its first epoch is saved."""

    def save(path, content, real=selfmis.save):
        real(path, content)
        if content.get("epoch") == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(selfmis, "save", save)
        with pytest.raises(KeyboardInterrupt):
            yield
