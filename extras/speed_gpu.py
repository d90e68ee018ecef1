"""All that a GPU must show, in one call of at most nine minutes: `python -m extras.speed gpu`.

Every part is a process with a time limit of its own and prints its rows of the table as soon as it
has them, so that a part that fails or hangs, and a call that is cut off, cost no other number.

rates      what the card multiplies and copies: the floor of every step
eager      the step of alignment by precision: full network, T = 5000, batch 128
teacher    embeddings of twelve leads, as the pass computes them
feed       steps that read the cache, beside steps on one batch
layout     the step of the network as ECGFounder publishes it, (B, C, T) and layer by layer
groups     the grouped convolutions alone
loss       the loss of 30 steps in float32, beside the CPU's
nccl       torchrun end to end: three epochs, killed in between and resumed, and a probe
compiled   the step again, under torch.compile
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import selfmis
from extras import command_parser, run_action
from extras.timing import TINY, LayeredResNet1D, convolution_shapes, count_macs, input_spec
from extras.timing import make_learner, median_seconds, train_step, wait_for
from selfmis import AMP_DTYPES, SIZES, Ranks, ResNet1D, SameConv1d
from train_pretrain import PretrainConfig

HERE = Path(__file__).resolve().parents[1]


class Scale(NamedTuple):
    """How large everything is."""

    architecture: dict
    rate_hz: int
    batch: int
    repeats: int
    matrix: int  # rows and columns
    copied_mib: int
    records: int  # of the part feed
    run: str  # flags of the part nccl

    @property
    def T(self) -> int:
        return 10 * self.rate_hz


FULL_RUN = "--data synthetic:4096 --size ecgfounder --sample-rate 500"
FULL = Scale(SIZES["ecgfounder"], 500, 128, 12, 8192, 2048, 1024, FULL_RUN)
MINI_RUN = "--data synthetic:160 --size small --sample-rate 50 --batch-size 16"
MINI = Scale(TINY, 50, 8, 2, 256, 8, 64, MINI_RUN)


def row(what: str, value: str, remark: str = "") -> None:
    """A line of the table, at once."""
    print(f"| {what} | {value} | {remark} |", flush=True)


# --------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------


def matrix_rate(dtype: torch.dtype, scale: Scale, device: torch.device) -> float:
    """Multiply-accumulates a second in a product of two large matrices."""
    n = scale.matrix
    a = torch.randn(n, n, device=device).to(dtype)
    return n**3 / median_seconds(partial(torch.matmul, a, a), scale.repeats, device)


def copy_rate(scale: Scale, device: torch.device) -> float:
    """Bytes a second, read and written, in a copy of one tensor into another."""
    source = torch.zeros(scale.copied_mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(partial(target.copy_, source), scale.repeats, device)
    return 2 * len(source) / seconds


def rates(scale: Scale, ranks: Ranks) -> None:
    n = scale.matrix
    for amp, dtype in AMP_DTYPES.items():
        rate = 2 * matrix_rate(dtype, scale, ranks.device)  # a multiplication and an addition
        row(f"product of {n} x {n}, {dtype}", f"{rate / 1e12:,.2f} TFLOP/s", f"--amp {amp}")
    row(f"copy of {scale.copied_mib} MiB", f"{copy_rate(scale, ranks.device) / 1e9:,.0f} GB/s")


def floor_seconds(encoder: ResNet1D, amp: str, scale: Scale, device: torch.device) -> float:
    """What a step takes at least, at the rates of this card.

    The larger of two: a pass forward and two of the same size backward of all multiply-accumulates;
    and the inputs and outputs of all convolutions three times through memory, beside the seven
    numbers a parameter that AdamW reads and writes.
    """
    dtype = AMP_DTYPES[amp]
    macs = 3 * scale.batch * count_macs(encoder, scale.rate_hz)
    width = torch.empty(0, dtype=dtype).element_size()
    parameters = sum(p.numel() for p in encoder.parameters())
    shapes = convolution_shapes(encoder, scale.batch, scale.T)
    numbers = sum(math.prod(shape) for input_and_output in shapes for shape in input_and_output)
    moved = 3 * width * numbers + 7 * 4 * parameters  # bytes
    return max(macs / matrix_rate(dtype, scale, device), moved / copy_rate(scale, device))


def random_batch(scale: Scale, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Signals (B, 1, T) and targets (B, D)."""
    signals = torch.randn(scale.batch, 1, scale.T, device=device)
    return signals, torch.randn(scale.batch, scale.architecture["widths"][-1], device=device)


def step_seconds(learner, batches, device: torch.device) -> float:
    """Of a step over (signals, targets), waited for at the end only, as training does."""
    steps = 0
    wait_for(device)
    start = time.perf_counter()
    for signals, targets in batches:
        train_step(learner, signals, targets)
        steps += 1
    wait_for(device)
    return (time.perf_counter() - start) / steps


def time_step(learner, scale: Scale, device: torch.device) -> tuple[float, str]:
    """Seconds a step, and the most memory that was reserved, that of captured graphs included."""
    batch = random_batch(scale, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(4):  # kernels are chosen, compiled, captured
        train_step(learner, *batch)
    seconds = step_seconds(learner, scale.repeats * [batch], device)
    peak = "no GPU"
    if device.type == "cuda":
        peak = f"{torch.cuda.max_memory_reserved() / 2**20:,.0f} MiB reserved"
    return seconds, peak


def steps(scale: Scale, ranks: Ranks, is_compiled: bool) -> None:
    """By precision: time, records/s, peak memory, share of the floor, and whether losses stay."""
    device = ranks.device
    for amp in ("bf16", "fp16", "off"):
        torch.manual_seed(0)
        encoder = ResNet1D(1, **scale.architecture)
        floor = floor_seconds(encoder, amp, scale, device)
        learner = make_learner(encoder, ranks, amp=amp, compile=is_compiled)
        seconds, peak = time_step(learner, scale, device)
        losses = [train_step(learner, *random_batch(scale, device)) for _ in range(8)]
        is_finite = bool(torch.stack(losses).isfinite().all())
        verdict = "losses finite" if is_finite else "LOSSES NOT FINITE"
        if amp == "fp16":
            verdict += f", scaled by {learner.scaler.get_scale():,.0f}"
        form = "compiled" if is_compiled else "eager"
        speed = f"{scale.batch / seconds:,.0f} records/s, {peak}"
        share = f"the floor, {1000 * floor:.2f} ms, is {floor / seconds:.0%} of that"
        row(f"step, {amp}, {form}", f"{1000 * seconds:.2f} ms", f"{speed}; {share}; {verdict}")


def teacher(scale: Scale, ranks: Ranks) -> None:
    encoder = ResNet1D(12, **scale.architecture).eval().to(ranks.device)
    ecg = torch.randn(4 * scale.batch, 12, scale.T)
    seconds = median_seconds(partial(selfmis.embed, encoder, ecg, ranks.device), 3, ranks.device)
    row(
        "teacher, float32",
        f"{len(ecg) / seconds:,.0f} records/s",
        "twelve leads, sent from the host's memory",
    )


def feed(scale: Scale, ranks: Ranks) -> None:
    """Does a step wait for the host, which reads the next batch out of the cache meanwhile?"""
    device, n = ranks.device, scale.records
    encoder = ResNet1D(12, **scale.architecture).eval().requires_grad_(False).to(device)
    learner = make_learner(ResNet1D(1, **scale.architecture), ranks, amp="bf16")
    with tempfile.TemporaryDirectory() as folder:
        config = PretrainConfig(cache=folder)
        rows = np.arange(n)
        records = selfmis.find_records(f"synthetic:{n}")
        pairs = selfmis.read_pairs(config, records, rows, input_spec(scale.rate_hz), ranks, encoder)
        batches = np.split(rows, n // scale.batch)
        step_seconds(learner, pairs.batches(batches), device)  # the first steps do not count
        batches = 4 * batches
        fed = step_seconds(learner, pairs.batches(batches), device)
        one = next(pairs.batches(batches))
        again = step_seconds(learner, [one] * len(batches), device)
        wait_for(device)
        start = time.perf_counter()
        for _ in pairs.batches(batches):
            pass
        host = (time.perf_counter() - start) / len(batches)
    remark = f"{fed / again:.2f} x the step that repeats one batch"
    row("step out of the cache, bf16", f"{1000 * fed:.2f} ms", remark)
    row("to read and send a batch", f"{1000 * host:.2f} ms", "time of the host")


def layout(scale: Scale, ranks: Ranks) -> None:
    encoder = ResNet1D(1, **scale.architecture)
    layered = LayeredResNet1D(encoder)
    x = torch.randn(4, 1, scale.T)
    with torch.no_grad():
        difference = float((layered(x) - encoder(x)).abs().max() / encoder(x).abs().max())
    for amp in ("bf16", "off"):
        learner = make_learner(layered, ranks, amp=amp)
        seconds, peak = time_step(learner, scale, ranks.device)
        remark = f"{peak}; embeddings differ by {difference:.0e} of the largest"
        row(f"step, {amp}, ECGFounder's layout", f"{1000 * seconds:.2f} ms", remark)


def groups(scale: Scale, ranks: Ranks) -> None:
    """Forward and backward of every grouped convolution of a step, in bf16, one at a time."""
    encoder = ResNet1D(1, **scale.architecture).to(ranks.device, torch.bfloat16)
    layers = [layer for layer in encoder.modules() if isinstance(layer, SameConv1d)]
    shapes = convolution_shapes(encoder, scale.batch, scale.T)
    seconds = []
    for layer, (shape, _) in zip(layers, shapes, strict=True):
        if layer.conv.groups > 1:
            x = torch.randn(shape, device=ranks.device, dtype=torch.bfloat16)
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            call = partial(forward_and_backward, layer, x, torch.randn_like(layer(x)))
            seconds.append(median_seconds(call, scale.repeats, ranks.device))
    many = f"{len(seconds)} of them, forward and backward"
    row("grouped convolutions alone, bf16", f"{1000 * sum(seconds):.2f} ms", many)


def forward_and_backward(layer: torch.nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> None:
    torch.autograd.grad(layer(x), [x, *layer.parameters()], gradient)


def loss(scale: Scale, ranks: Ranks) -> None:
    """Of 30 steps from equal weights on equal batches, here and on the CPU."""
    curves = []
    for device in (torch.device("cpu"), ranks.device):
        torch.manual_seed(0)
        architecture = SIZES["small"] if scale is FULL else TINY
        encoder = ResNet1D(1, **architecture)
        signals = torch.randn(64, 1, 1000)
        targets = torch.randn(64, encoder.embedding_dim)
        learner = make_learner(encoder, ranks._replace(device=device), amp="off", lr=1e-3)
        batch = signals.to(device), targets.to(device)
        curves.append(torch.stack([train_step(learner, *batch) for _ in range(30)]).cpu())
    there, here = curves
    difference = float(((here - there) / there).abs().max())
    ends = f"from {here[0]:.4f} to {here[-1]:.4f}, on the CPU to {there[-1]:.4f}"
    row("loss of 30 steps, float32", f"{difference:.1e} apart", ends)


def nccl(scale: Scale, ranks: Ranks) -> None:
    """As a user starts it; one process exchanges with itself what several would."""
    with tempfile.TemporaryDirectory() as folder:
        out, probe_out = Path(folder) / "run", Path(folder) / "probe"
        device = ["--device", ranks.device.type]
        pretrain = ["train_pretrain.py", *scale.run.split(), *device, "--multi", "random"]
        pretrain += ["--loss", "softmax", "--epochs", "3", "--out", str(out), "--resume"]
        start = time.perf_counter()
        process = start_torchrun(pretrain)
        for line in process.stdout:
            if line.startswith("epoch 1/3 |"):  # it is saved
                break
        else:
            sys.exit("torchrun ended before an epoch did")
        process.terminate()
        process.communicate()
        row("torchrun: pass, an epoch, killed", f"{time.perf_counter() - start:.1f} s")
        probe = ["train_probe.py", *scale.run.split()[:2], *device]  # --data
        probe += ["--encoder", str(out / "best.pt"), "--out", str(probe_out)]
        for what, command in (("resumed, the other epochs", pretrain), ("probe", probe)):
            start = time.perf_counter()
            process = start_torchrun(command)
            text, _ = process.communicate()
            if process.returncode:
                sys.exit(text)
            last = [line for line in text.splitlines() if line.startswith(("epoch 3/3", "| six"))]
            remark = " ".join(last[-1].replace("|", " ").split())
            row(f"torchrun: {what}", f"{time.perf_counter() - start:.1f} s", remark)


def start_torchrun(command: list[str]) -> subprocess.Popen:
    """One process under torchrun, whose output is kept."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "1", *command]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(torchrun, cwd=HERE, **pipes)


# Function, and its limit in seconds.
PARTS = {
    "rates": (rates, 30),
    "eager": (partial(steps, is_compiled=False), 60),
    "teacher": (teacher, 40),
    "feed": (feed, 60),
    "layout": (layout, 40),
    "groups": (groups, 40),
    "loss": (loss, 40),
    "nccl": (nccl, 110),
    "compiled": (partial(steps, is_compiled=True), 240),
}
LIMIT = 530  # seconds of all parts together


# --------------------------------------------------------------------------------------------------
# One call
# --------------------------------------------------------------------------------------------------


def run_all(device: str, mini: bool) -> None:
    """Every part in a process of its own; ends with an error if one failed."""
    parts = [part for part in PARTS if device == "cuda" or part != "compiled"]
    print("| what | | |\n|---|--:|---|", flush=True)
    began = time.perf_counter()
    failed = []
    for part in parts:
        command = [sys.executable, "-m", "extras.speed_gpu", part, "--device", device]
        if mini:
            command.append("--mini")
        left = LIMIT - (time.perf_counter() - began)
        limit = min(PARTS[part][1], left)
        process = subprocess.Popen(command, cwd=HERE, start_new_session=True)
        try:
            returncode = process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            returncode = process.wait()
            row(part, "cut off", f"after {limit:.0f} s")
        if returncode:
            failed.append(part)
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}")


def end(process: subprocess.Popen) -> None:
    """With what it has started: torchrun's own processes end if it has time to end them."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def run_part(flags: argparse.Namespace) -> None:
    ranks = selfmis.join_ranks(flags.device, seed=0)
    part, _ = PARTS[flags.part]
    part(MINI if flags.mini else FULL, ranks)


def main(argv=None) -> None:
    parser = command_parser("extras.speed_gpu", __doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--mini", action="store_true", help="a tiny network, a few steps")
    run_action(run_part, parser.parse_args(argv))


if __name__ == "__main__":
    main()
