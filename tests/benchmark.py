"""Speed, memory and growth; by hand, one table for the device at hand:  python tests/benchmark.py [pipeline probe metrics detect simulator gpu growth]

On an NVIDIA H200 (torch 2.11, CUDA 13.0; full network, T = 5000, batch 128, one AdamW step with clipping, medians of 12)
this was tried on the encoder's step, in bf16 unless said:

    layout (B, C, T), as ECGFounder                             30 ms, of which the GPU works 21; peak 2,962 MiB
    the same, float32 (tf32) / fp16                             41 ms / 37 ms
    (B, C, 1, T) channels-last                                  GPU works 17 ms; the launches from Python still take 30 or more
    the same, captured as a CUDA graph                          19 ms; (B, C, T) captured: 23 ms
    ... 1x1 convolutions as F.linear                            18.5 ms: not worth a second form
    ... padding by slicing / maximum instead of max-pooling     19.4 / 20.9 ms: worse
    torch.compile, mode reduce-overhead, (B, C, T)              16.4 ms
    torch.compile, mode reduce-overhead, channels-last          13.0 ms, 9,870 records/s, peak 3,114 MiB: kept, as --compile
    cudnn.benchmark off                                         70 ms eager

One grouped convolution (16 channels a group, kernel 16, forward and backward, ms at C x T = 64 x 1250, 400 x 157, 1024 x 20):
conv1d .60 .50 .43; conv2d channels-last .23 .28 .17; unfold and batched product 1.11 .81 .39; groups merged into dense blocks
.59 1.04 .98; wholly dense .71 1.01 .69.  So channels-last it is.  The floor: 0.88 TFLOP a step at 790 TFLOP/s is 1.1 ms, and
reading and writing every layer's input and output once about 1.3 ms at 4.3 TB/s; 13.0 ms is some 10 times that, spent in
elementwise passes (SiLU, padding, gates, sums of bias gradients) that a hand-written kernel would fuse.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import selfmis
from selfmis import LEADS, ResNet1D, SelfCuttingDataset, SelfMIS

ALONE = selfmis.Ranks(0, 1, 0, 1, torch.device("cpu"))
VIEW = selfmis.View("I", 500, {"normalize": "zscore", "filter": "none"})


def clock(function, repeat: int = 5) -> float:
    """Median seconds of a call, after one call that does not count."""
    function()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def write_collection(folder: Path, n: int) -> None:
    from conftest import write_record

    for i, ecg in enumerate(selfmis.synthesize(n, 0)[0]):
        write_record(folder / f"{i:05}", ecg, rate=500)


def settings(folder):
    return type("Settings", (), dict(cache=str(folder), out="unused/run", workers=0, strict=False))


def pipeline() -> None:
    """The plain loop (every epoch: wfdb, teacher, student) against one pass and then the student alone; milliseconds a record."""
    print(f"pipeline: full network, 12 leads, 500 Hz, batch 16, {torch.get_num_threads()} threads; milliseconds a record")
    with tempfile.TemporaryDirectory() as folder:
        write_collection(Path(folder) / "data", 192)
        records = selfmis.find_records(str(Path(folder) / "data"))
        dataset = SelfCuttingDataset(records)
        teacher, model = ResNet1D(12).eval(), SelfMIS(ResNet1D(1))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        batch = [dataset[i] for i in range(16)]
        single, multi = (torch.stack(part) for part in zip(*batch))
        with torch.no_grad():
            targets = teacher(multi)

        def student():
            model(single, targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        pairs = selfmis.read_pairs(settings(Path(folder) / "warm"), records, VIEW, ALONE, "pass", teacher)
        rows = np.random.default_rng(0).permutation(192)
        cost = dict(
            read=clock(lambda: [dataset[i] for i in range(16)]) / 16,
            teacher=clock(lambda: selfmis.embed(teacher, torch.cat([multi, multi]), torch.device("cpu")), 3) / 32,
            student=clock(student, 3) / 16,
            rows=clock(lambda: [None for _ in pairs.batches(np.array_split(rows, 12))]) / 192,
        )
        start = time.perf_counter()
        selfmis.read_pairs(settings(Path(folder) / "cold"), records, VIEW, ALONE, "pass", teacher)
        cost["pass"] = (time.perf_counter() - start) / 192
    for name, seconds in cost.items():
        print(f"  {name:<8}{1000 * seconds:9.3f}")
    plain = 20 * (cost["read"] + cost["teacher"] + cost["student"])
    first, second = cost["pass"] + 20 * (cost["rows"] + cost["student"]), 20 * (cost["rows"] + cost["student"])
    print(f"  20 epochs, per record: plain {1000 * plain:.0f}, ours {1000 * first:.0f} ({plain / first:.2f} x), with the cache there {1000 * second:.0f} ({plain / second:.2f} x)")
    print(f"  data loading in an epoch: {cost['read'] / cost['rows']:.0f} x faster than wfdb")


def probe() -> None:
    """A linear head by 20 epochs of Adam: features once, or the encoder in every epoch; the same batches, so the same head."""
    import train_probe

    config, n = train_probe.ProbeConfig(patience=99), 512
    x, y = selfmis.synthesize(n, 0, leads=("I",), sample_rate_hz=100)
    x, y = torch.from_numpy(np.stack([selfmis.preprocess(one, sample_rate_hz=100) for one in x])), torch.from_numpy(y).float()
    encoder = ResNet1D(1, **selfmis.SIZES["small"]).eval()

    def once():
        z = selfmis.embed(encoder, x, torch.device("cpu"))
        return train_probe.adam_head(z, y, z, y, config, 0)[:2]

    def every():
        z = selfmis.embed(encoder, x, torch.device("cpu"))  # for the scale alone, not counted
        start = time.perf_counter()
        scale, generator, bound = z.square().mean().sqrt(), torch.Generator().manual_seed(0), z.shape[1] ** -0.5
        weight = (2 * bound * torch.rand(y.shape[1], z.shape[1], generator=generator) - bound).requires_grad_()
        bias, steps, best = torch.zeros(y.shape[1], requires_grad=True), -(-n // config.batch_size), -1.0
        optimizer = torch.optim.Adam([weight, bias], lr=config.lr)
        for epoch in range(config.epochs):
            for step, rows in enumerate(torch.randperm(n, generator=generator).split(config.batch_size)):
                optimizer.param_groups[0]["lr"] = selfmis.cosine_lr(config.lr, epoch * steps + step, config.epochs * steps)
                with torch.no_grad():
                    features = encoder(x[rows]) / scale
                optimizer.zero_grad()
                torch.nn.functional.binary_cross_entropy_with_logits(torch.nn.functional.linear(features, weight, bias), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                auc = selfmis.macro_auc(y, torch.nn.functional.linear(torch.cat([encoder(part) for part in x.split(256)]) / scale, weight, bias))[0]
            if auc > best:
                best, kept = auc, (weight.detach() / scale, bias.detach().clone())
        return kept, time.perf_counter() - start

    start = time.perf_counter()
    head = once()
    ours = time.perf_counter() - start
    plain, theirs = every()
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(head, plain))
    print(f"probe of 20 epochs, small, 100 Hz, {n} records: features once {ours:.1f} s, the encoder in every epoch {theirs:.1f} s ({theirs / ours:.1f} x); relative difference of the heads {difference:.0e}")


def detect() -> None:
    """One recording through a detector with the full network."""
    with tempfile.TemporaryDirectory() as folder:
        K, encoder = len(selfmis.STATEMENTS), ResNet1D(1)
        content = selfmis.encoder_content(encoder, VIEW, []) | dict(head=(torch.randn(K, 1024), torch.zeros(K)), classes=list(selfmis.STATEMENTS), temperature=1.0)
        selfmis.save(Path(folder) / "probe.pt", content | dict(points={"youden": torch.zeros(K, 3)}, positives=torch.zeros(K)))
        detector, ecg = selfmis.load_detector(Path(folder) / "probe.pt"), selfmis.synthesize(1, 0, leads=("I",))[0][0]
        print(f"detect: full network, 10 s at 500 Hz, {torch.get_num_threads()} threads: {1000 * clock(lambda: detector(ecg, 500), 9):.0f} ms a recording")


def simulator() -> None:
    """synthesize beside NeuroKit2's 12-lead simulator (pip install neurokit2), one thread each."""
    try:
        import neurokit2
    except ImportError:
        print("simulator: needs neurokit2")
        return
    theirs = clock(lambda: neurokit2.ecg_simulate(duration=10, sampling_rate=500, method="multileads", random_state=0), 3)
    ours = clock(lambda: selfmis.synthesize(256, 0), 3) / 256
    print(f"simulator, 12 leads, 10 s at 500 Hz: NeuroKit2 {1 / theirs:.2f} records/s, synthesize {1 / ours:,.0f} records/s ({theirs / ours:.0f} x)")


def growth() -> None:
    """The pass over 1,000, 10,000 and 100,000 synthetic records: time a record and resident memory."""
    view = selfmis.View("I", 100, {"normalize": "zscore", "filter": "none"})
    for n in (1_000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            records = selfmis.find_records(f"synthetic:{n}")
            start = time.perf_counter()
            selfmis.read_pairs(settings(folder), records, view, ALONE, f"{n:,}")
            seconds = time.perf_counter() - start
        print(f"growth: {n:>7,} records, {1000 * seconds / n:.2f} ms a record, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


def metrics() -> None:
    rng = np.random.default_rng(0)
    y, score = rng.random(1_000_000) < 0.1, rng.integers(0, 5000, 1_000_000).astype(np.float32)
    print(f"roc_auc of a million scores with ties: {clock(lambda: selfmis.roc_auc(y, score), 3):.2f} s")
    z = torch.randn(100_000, 128)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    selfmis.retrieval(z, z + torch.randn_like(z))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"retrieval of 100,000 pairs, 128-d: {time.perf_counter() - start:.0f} s, {(after - before) / 1024:,.0f} MiB more at its peak (the whole matrix would take {1e10 * 4 / 2**20:,.0f})")


def gpu() -> None:
    """Step of pre-training: full network, T = 5000, batch 128, by precision, eager and compiled."""
    if not torch.cuda.is_available():
        print("gpu: none here")
        return
    print(f"gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}; full network, T = 5000, batch 128")
    torch.backends.cudnn.benchmark = True
    single, targets = torch.randn(128, 1, 5000, device="cuda"), torch.randn(128, 1024, device="cuda")
    for amp, compiled in (("off", False), ("fp16", False), ("bf16", False), ("bf16", True)):
        model = SelfMIS(ResNet1D(1)).cuda()
        if compiled:
            model.encoder.compile(mode="reduce-overhead")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        precision, scaler, _ = selfmis.autocast(torch.device("cuda"), amp)

        def step():
            with precision():
                loss = model(single, targets)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            torch.cuda.synchronize()

        for _ in range(3):
            step()
        torch.cuda.reset_peak_memory_stats()
        seconds = clock(step, 12)
        print(f"  amp {amp:<5}{'compiled' if compiled else 'eager':<9}{1000 * seconds:7.1f} ms {128 / seconds:8,.0f} records/s, peak {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["pipeline", "probe", "metrics", "detect", "simulator", "gpu", "growth"])
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}, leads {len(LEADS)}")
    for part in parser.parse_args().parts:
        dict(pipeline=pipeline, probe=probe, metrics=metrics, detect=detect, simulator=simulator, gpu=gpu, growth=growth)[part]()
