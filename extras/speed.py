"""Speed, memory and growth on the machine at hand.

    python -m extras.speed                 all but gpu, some twenty minutes on two cores
    python -m extras.speed cost detect     only these
    python -m extras.speed gpu             the training step on a GPU
    python -m extras.speed gpu --device cpu --mini     the same code in seconds: does it run?

cost       Table 4: parameters, multiply-accumulates, records/s and memory of the encoders
pipeline   one pass and a cache, beside a loop that reads and embeds in every epoch
probe      features once, beside an encoder that runs in every epoch
metrics    roc_auc and retrieval of large sets
detect     one recording through a detector
simulator  synthesize beside NeuroKit2's simulator (pip install neurokit2)
growth     the pass over 1,000, 10,000 and 100,000 records
gpu        the step of alignment by precision, eager and compiled
"""

import argparse
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import selfmis
import train_pretrain
import train_probe
from extras.detect import PROBE_KEYS, load_detector, run_command
from extras.synthetic import synthesize
from selfmis import LEADS, SIZES, STATEMENTS, InputSpec, Learner, Ranks, ResNet1D, SelfMIS
from selfmis import UsageError
from train_pretrain import PretrainConfig

TINY = dict(stem=16, widths=[16, 32], depths=[1, 1])  # the encoder of --mini
ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def median_seconds(function, repeats: int = 5) -> float:
    """Of a call, after one that does not count."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def peak_mib() -> float:
    """The most memory that this process has held."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def input_spec(rate_hz: float) -> InputSpec:
    return InputSpec("I", rate_hz, dict(normalize="zscore", filter="none"))


def make_learner(encoder: ResNet1D, ranks: Ranks, **settings) -> Learner:
    """An encoder ready to be aligned, as train_pretrain.py makes it."""
    config = PretrainConfig(**settings)
    model = SelfMIS(encoder, config.loss).to(ranks.device)
    return Learner(model, train_pretrain.make_optimizer(model, config), config, ranks)


def train_step(learner: Learner, signals: torch.Tensor, targets: torch.Tensor) -> None:
    """One step of alignment, waited for: signals (B, 1, T), targets (B, D)."""
    learner.update(learner.forward(signals, targets))
    if learner.device.type == "cuda":
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------


def cost(device: torch.device) -> None:
    """Table 4 of one record of 10 s; SelfMIS is one encoder of each kind."""
    lines = [["encoder", "leads", "parameters", "GMAC", "records/s", "peak MiB so far"]]
    for size in ("small", "ecgfounder"):
        for rate_hz in (100, 500):
            for leads in (1, 12):
                encoder = ResNet1D(leads, **SIZES[size]).eval().to(device)
                parameters = sum(p.numel() for p in encoder.parameters())
                ecg = torch.randn(64, leads, 10 * rate_hz)
                seconds = median_seconds(partial(selfmis.embed, encoder, ecg, device), 3)
                gmac = f"{count_macs(encoder, rate_hz) / 1e9:.3f}"
                memory = peak_mib()
                if device.type == "cuda":
                    memory = torch.cuda.max_memory_allocated() / 2**20
                name = f"{size}, {rate_hz} Hz"
                speed = f"{len(ecg) / seconds:,.0f}"
                lines.append([name, leads, f"{parameters:,}", gmac, speed, f"{memory:,.0f}"])
    print(train_probe.as_markdown(lines))


def count_macs(encoder: ResNet1D, rate_hz: int) -> int:
    """Multiply-accumulates of convolutions and linear layers for 10 s; nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ResNet1D(**encoder.architecture)(torch.empty(1, encoder.leads, 10 * rate_hz))
    return counter.get_total_flops() // 2


def pipeline() -> None:
    """A plain loop, which reads and embeds every record in every epoch, beside one pass."""
    with tempfile.TemporaryDirectory() as folder:
        cost = time_pipeline(Path(folder))
    print("full network, 12 leads, 500 Hz, batch 16; milliseconds a record:")
    for name, seconds in cost.items():
        print(f"  {name:<32}{1000 * seconds:9.3f}")
    plain = 20 * (cost["reading it"] + cost["teacher"] + cost["student"])
    cached = 20 * (cost["reading the cache"] + cost["student"])
    ours = cost["first pass"] + cached
    loops = {"20 epochs of a plain loop": plain, "ours": ours, "ours, with the cache there": cached}
    for name, seconds in loops.items():
        print(f"  {name:<32}{1000 * seconds:9.0f}  {plain / seconds:.2f} x faster")


def time_pipeline(folder: Path, n: int = 192, batch: int = 16) -> dict[str, float]:
    """Seconds a record of every part."""
    write_records(folder / "data", n)
    records = selfmis.find_records(str(folder / "data"))
    dataset = selfmis.SelfCuttingDataset(records)
    teacher, learner = ResNet1D(12).eval(), make_learner(ResNet1D(1), ALONE)
    config = PretrainConfig(cache=str(folder / "cache"), workers=0)
    rows = np.random.default_rng(0).permutation(n)
    started = time.perf_counter()
    pairs = selfmis.read_pairs(config, records, rows, input_spec(500), ALONE, teacher)
    cost = {"first pass": (time.perf_counter() - started) / n}

    def read() -> list:
        return [dataset[i] for i in range(2 * batch)]

    def read_cache() -> list:
        return list(pairs.batches(np.array_split(rows, n // batch)))

    signals, targets = read_cache()[0]
    multi = torch.stack([multi for _, multi in read()])  # (2 B, 12, T), what `embed` likes
    embed = partial(selfmis.embed, teacher, multi, ALONE.device)
    cost["reading it"] = median_seconds(read) / len(multi)
    cost["teacher"] = median_seconds(embed, 3) / len(multi)
    cost["student"] = median_seconds(partial(train_step, learner, signals, targets), 3) / batch
    cost["reading the cache"] = median_seconds(read_cache) / n
    return cost


def write_records(folder: Path, n: int) -> None:
    """n synthetic WFDB records."""
    wfdb = selfmis.import_optional("wfdb", "writing records")
    folder.mkdir()
    units, formats = ["mV"] * len(LEADS), ["16"] * len(LEADS)
    for i, ecg in enumerate(synthesize(n, 0)[0]):
        signal = ecg.T.astype(np.float64)  # (T, 12)
        wfdb.wrsamp(f"{i:05}", 500, units, list(LEADS), signal, fmt=formats, write_dir=str(folder))


def probe() -> None:
    """A linear head: features once, beside an encoder that runs in each of 20 epochs."""
    n, epochs = 512, 20
    ecg, labels = synthesize(n, 0, leads=("I",), sample_rate_hz=100)
    x = torch.from_numpy(np.stack([selfmis.preprocess(one, sample_rate_hz=100) for one in ecg]))
    y = torch.from_numpy(labels).float()
    encoder = ResNet1D(1, **SIZES["small"]).eval()
    started = time.perf_counter()
    features = selfmis.embed(encoder, x, ALONE.device)
    embedding = time.perf_counter() - started
    config = train_probe.ProbeConfig(epochs=epochs, patience=epochs)
    train_probe.adam_head(features, y, features, y, config, 0)
    head = time.perf_counter() - started - embedding
    once, every = embedding + head, epochs * embedding + head
    print(
        f"{n} records, small network, 100 Hz, {epochs} epochs of the Adam head: {once:.1f} s with"
    )
    print(f"features once, {every:.1f} s with the encoder in every epoch ({every / once:.1f} x)")


def metrics() -> None:
    """Exact metrics of whole sets: their time and memory."""
    rng = np.random.default_rng(0)
    y, score = rng.random(1_000_000) < 0.1, rng.integers(0, 5000, 1_000_000).astype(np.float32)
    seconds = median_seconds(partial(selfmis.roc_auc, y, score), 3)
    print(f"roc_auc of a million scores with ties: {seconds:.2f} s")
    z = torch.randn(100_000, 128)
    noisy = z + torch.randn_like(z)
    before, started = peak_mib(), time.perf_counter()
    selfmis.retrieval(z, noisy)
    seconds, more = time.perf_counter() - started, peak_mib() - before
    print(f"retrieval of 100,000 pairs, 128-d: {seconds:.0f} s, {more:,.0f} MiB more at its peak")
    print(f"(the whole matrix would take {4 * 1e10 / 2**20:,.0f})")


def detect() -> None:
    """One recording of 10 s through a detector with the full network."""
    encoder = ResNet1D(1)
    content = selfmis.encoder_content(encoder, input_spec(500), []) | dict.fromkeys(PROBE_KEYS)
    head = torch.randn(len(STATEMENTS), encoder.embedding_dim), torch.zeros(len(STATEMENTS))
    content |= dict(head=head, classes=list(STATEMENTS), temperature=1.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.pt"
        selfmis.save(path, content)
        detector = load_detector(path)
    ecg = synthesize(1, 0, leads=("I",))[0][0]  # (1, 5000)
    seconds = median_seconds(partial(detector, ecg, 500), 9)
    print(f"a recording of 10 s at 500 Hz, full network: {1000 * seconds:.0f} ms")


def simulator() -> None:
    """synthesize beside NeuroKit2's 12-lead simulator."""
    try:
        neurokit2 = selfmis.import_optional("neurokit2", "the part simulator")
    except UsageError as error:
        print(error)
        return
    settings = dict(duration=10, sampling_rate=500, method="multileads", random_state=0)
    theirs = median_seconds(partial(neurokit2.ecg_simulate, **settings), 3)
    ours = median_seconds(partial(synthesize, 256, 0), 3) / 256
    rates = f"NeuroKit2 {1 / theirs:.2f}, synthesize {1 / ours:,.0f} ({theirs / ours:.0f} x)"
    print(f"synthetic records of 12 leads, 10 s at 500 Hz, a second: {rates}")


def growth() -> None:
    """The pass over more and more synthetic records: time a record, and memory."""
    for n in (1_000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            config = PretrainConfig(cache=folder, workers=0)
            records = selfmis.find_records(f"synthetic:{n}")
            started = time.perf_counter()
            selfmis.read_pairs(config, records, np.arange(n), input_spec(100), ALONE)
            milliseconds = 1000 * (time.perf_counter() - started) / n
        print(f"{n:,} records: {milliseconds:.2f} ms a record, peak memory {peak_mib():,.0f} MiB")


def gpu(ranks: Ranks, mini: bool) -> None:
    """The step of alignment: full network, T = 5000, batch 128; on a GPU compiled too."""
    batch, T, repeats, architecture = 128, 5000, 12, SIZES["ecgfounder"]
    if mini:
        batch, T, repeats, architecture = 8, 500, 2, TINY
    is_cuda = ranks.device.type == "cuda"
    variants = [("off", False), ("bf16", False), ("fp16", False)]
    if is_cuda:
        variants += [(amp, True) for amp, _ in variants]
    signals = torch.randn(batch, 1, T, device=ranks.device)
    targets = torch.randn(batch, architecture["widths"][-1], device=ranks.device)
    for amp, is_compiled in variants:
        learner = make_learner(ResNet1D(1, **architecture), ranks, amp=amp, compile=is_compiled)
        step = partial(train_step, learner, signals, targets)
        for _ in range(3):  # kernels are chosen and compiled
            step()
        memory = ""
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(step, repeats)
        if is_cuda:
            memory = f", peak {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB"
        form = "compiled" if is_compiled else "eager"
        text = f"{1000 * seconds:.1f} ms a step, {batch / seconds:,.0f} records/s{memory}"
        print(f"amp {amp}, {form}: {text}", flush=True)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def run_parts(flags: argparse.Namespace) -> None:
    ranks = selfmis.join_ranks(flags.device, seed=0)
    parts = dict(cost=partial(cost, ranks.device), pipeline=pipeline, probe=probe, metrics=metrics)
    parts |= dict(detect=detect, simulator=simulator, growth=growth)
    chosen = flags.parts or list(parts)
    parts["gpu"] = partial(gpu, ranks, flags.mini)
    unknown = [part for part in chosen if part not in parts]
    if unknown:
        raise UsageError(f"no part {unknown[0]}; there are {', '.join(parts)}")
    device = "CPU"
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name()
    threads = f"{selfmis.available_cores()} cores, {torch.get_num_threads()} threads"
    print(f"{device}, {threads}, torch {torch.__version__}", flush=True)
    for part in chosen:
        print(f"\n{part}")
        parts[part]()


def main(argv=None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m extras.speed", None, __doc__, allow_abbrev=False, formatter_class=layout
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="which; default: all but gpu")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--mini", action="store_true", help="gpu: a tiny network, a few steps")
    run_command(run_parts, parser, argv)


if __name__ == "__main__":
    main()
