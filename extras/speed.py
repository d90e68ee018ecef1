"""Speed, memory and growth on the machine at hand.

    python -m extras.speed                 all but gpu, some twenty-five minutes on two cores
    python -m extras.speed cost detect     only these
    python -m extras.speed gpu             what a GPU does, nine minutes at most
    python -m extras.speed gpu --device cpu --mini     does it run? half a minute; not compiled

cost       Table 4: parameters, multiply-accumulates, records/s and memory of the encoders
network    forward, and forward with backward, beside ECGFounder's network, layer by layer
pipeline   one pass and a cache, beside a loop that reads and embeds in every epoch
probe      features once, beside an encoder that runs in every epoch
metrics    roc_auc and retrieval of large sets
detect     one recording through a detector
simulator  synthesize beside NeuroKit2's simulator (pip install neurokit2)
growth     the pass over 1,000, 10,000 and 100,000 records
gpu        extras/speed_gpu.py
"""

import argparse
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

import selfmis
import train_probe
from extras import command_parser, run_action, speed_gpu
from extras.detect import PROBE_KEYS, load_detector
from extras.synthetic import synthesize
from extras.timing import ALONE, LayeredResNet1D, count_macs, in_turns, input_spec, make_learner
from extras.timing import median_seconds, peak_mib, train_step, write_records
from selfmis import SIZES, STATEMENTS, ResNet1D, UsageError
from train_pretrain import PretrainConfig

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
                ecg = torch.randn(128, leads, 10 * rate_hz)  # a whole chunk of `embed`
                seconds = median_seconds(partial(selfmis.embed, encoder, ecg, device), 3)
                gmac = f"{count_macs(encoder, rate_hz) / 1e9:.3f}"
                memory = peak_mib()
                if device.type == "cuda":
                    memory = torch.cuda.max_memory_allocated() / 2**20
                name = f"{size}, {rate_hz} Hz"
                speed = f"{len(ecg) / seconds:,.0f}"
                lines.append([name, leads, f"{parameters:,}", gmac, speed, f"{memory:,.0f}"])
    print(train_probe.as_markdown(lines))


def network() -> None:
    """Milliseconds of theirs / ours, and the ratio: above 1 ours is faster."""
    torch.manual_seed(0)
    ours = ResNet1D(1)
    theirs = LayeredResNet1D(ours)
    x = torch.randn(2, 1, 5000)
    with torch.no_grad():
        difference = float((theirs(x) - ours(x)).abs().max() / ours(x).abs().max())
    print(f"embeddings differ by {difference:.0e} of the largest")
    print("pass | precision | threads | T | 1 record | 8 records | 64 records", flush=True)
    usual_threads = torch.get_num_threads()
    passes = dict(forward=forward, training=forward_and_backward)
    for name, amp, threads, T in product(passes, ("off", "bf16"), (1, 2), (1000, 5000)):
        torch.set_num_threads(threads)
        cells = []
        for B in (1, 8, 64):
            x = torch.randn(B, 1, T)
            call = partial(passes[name], x=x, amp=amp)
            seconds = in_turns({"theirs": partial(call, theirs), "ours": partial(call, ours)})
            t, o = 1000 * seconds["theirs"], 1000 * seconds["ours"]
            cells.append(f"{t:.0f} / {o:.0f} = {t / o:.2f}")
        print(" | ".join([name, amp, str(threads), str(T), *cells]), flush=True)
    torch.set_num_threads(usual_threads)


def forward(encoder, x: torch.Tensor, amp: str) -> None:
    with torch.no_grad():
        embed_in(encoder, x, amp)


def forward_and_backward(encoder, x: torch.Tensor, amp: str) -> None:
    embed_in(encoder, x, amp).square().sum().backward()
    encoder.zero_grad()


def embed_in(encoder, x: torch.Tensor, amp: str) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
        return encoder(x).float()


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
    print("sums of these, nothing overlapped, for 20 epochs:")
    loops = {"a plain loop": plain, "ours": ours, "ours, with the cache there": cached}
    for name, seconds in loops.items():
        print(f"  {name:<32}{1000 * seconds:9.0f}  {plain / seconds:.2f} x faster")


def time_pipeline(folder: Path) -> dict[str, float]:
    """Seconds a record of every part."""
    n, batch = 192, 16
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

    def read_headers() -> list:
        wfdb = selfmis.import_optional("wfdb", "reading headers")
        return [wfdb.rdheader(records.name(i)) for i in range(2 * batch)]

    signals, targets = read_cache()[0]
    multi = torch.stack([multi for _, multi in read()])  # (2 B, 12, T), what `embed` likes
    embed = partial(selfmis.embed, teacher, multi, ALONE.device)
    cost["reading it"] = median_seconds(read) / len(multi)
    cost["of that, its header"] = median_seconds(read_headers) / len(multi)
    cost["teacher"] = median_seconds(embed, 3) / len(multi)
    cost["student"] = median_seconds(partial(train_step, learner, signals, targets), 3) / batch
    cost["reading the cache"] = median_seconds(read_cache) / n
    return cost


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
    print(f"features once; with features in every epoch it would be {every:.1f} s")


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
    print(f"retrieval of 100,000 pairs, 128-d: {seconds:.0f} s, {more:,.0f} MiB above the peak of")
    print(f"what ran before (the whole matrix would take {4 * 1e10 / 2**20:,.0f})")


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


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def run_parts(flags: argparse.Namespace) -> None:
    ranks = selfmis.join_ranks(flags.device, seed=0)
    parts = dict(cost=partial(cost, ranks.device), network=network, pipeline=pipeline, probe=probe)
    parts |= dict(metrics=metrics, detect=detect, simulator=simulator, growth=growth)
    chosen = flags.parts or list(parts)
    parts["gpu"] = partial(speed_gpu.run_all, ranks.device.type, flags.mini)
    unknown = [part for part in chosen if part not in parts]
    if unknown:
        raise UsageError(f"no part {unknown[0]}; there are {', '.join(parts)}")
    if "gpu" in chosen and ranks.device.type != "cuda" and not flags.mini:
        raise UsageError(
            "gpu: needs a GPU; --mini runs all but the compiled step in miniature on the CPU"
        )
    threads = f"{selfmis.available_cores()} cores, {torch.get_num_threads()} threads"
    print(f"CPU, {threads}, torch {torch.__version__}", flush=True)
    if ranks.device.type == "cuda":
        print(f"cost and gpu: {torch.cuda.get_device_name()}", flush=True)
    for part in chosen:
        print(f"\n{part}")
        parts[part]()


def main(argv=None) -> None:
    parser = command_parser("extras.speed", __doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="which; default: all but gpu")
    devices = ("auto", "cpu", "cuda", "mps")
    parser.add_argument("--device", default="auto", choices=devices, help="of cost and gpu")
    parser.add_argument("--mini", action="store_true", help="gpu: a tiny network, a few steps")
    run_action(run_parts, parser.parse_args(argv))


if __name__ == "__main__":
    main()
