"""Eleven leads made out of lead I: writes them, and scores them as a record (Table 2, Fig. 1).

    python -m extras.baselines.generated make runs/pix2pix/best.pt --data ptb-xl --out runs/pix2pix
    python -m extras.baselines.generated make fir --sample-rate 100 --data ptb-xl --out runs/fir
    python -m extras.baselines.generated score runs/pix2pix runs/fir --data ptb-xl \\
        --probe runs/teacher-frozen/probe.pt --picture generated.png

make:  OUT/generated.npy, (N, 12, T) float32 in mV, the leads in the order of LEADS and lead I as it
       was, of the labelled records of the test fold; OUT/generated.json names them.  `fir` is a
       filter of 31 taps for each lead, least squares on the records of the training folds.
score: a twelve-lead classifier whose head was fitted on real leads (probe.pt of a teacher,
       --lead all) ranks them, beside real leads, lead I with zeros, and lead I in all rows.
       Errors, correlations and variances are means over the eleven leads that were made; FID is the
       Frechet distance to the real records' embeddings.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import selfmis
import train_probe
from extras.baselines.gan import Generator, UNetGenerator
from extras.baselines.mcma import MCMAGenerator
from extras.detect import run_command
from extras.evidence import MEANS, Scores, difference, print_table
from extras.synthetic import save_picture
from selfmis import LEADS, Records, UsageError, import_optional

GENERATORS = {network.__name__: network for network in (UNetGenerator, MCMAGenerator)}
TAPS = 31
FIT_RECORDS = 2000  # of the training folds, for the filter
MADE = slice(1, 12)  # the leads but I


def test_records(flags: argparse.Namespace, rate_hz: float) -> Records:
    """The labelled records of the test fold."""
    records = selfmis.find_records(flags.data, sample_rate_hz=rate_hz)
    records = records[records.labels.any(1) & (records.folds == flags.test_fold)]
    if not len(records):
        raise UsageError(f"{flags.data}: no labelled record in fold {flags.test_fold}")
    return records


def read_mv(records: Records, rate_hz: float) -> np.ndarray:
    """(N, 12, T) float32 in mV, ten seconds each."""
    ecgs = (records.read(i, LEADS, rate_hz) for i in range(len(records)))
    options = dict(sample_rate_hz=rate_hz, normalize="none")
    return np.stack([selfmis.preprocess(ecg, **options) for ecg in ecgs])


# --------------------------------------------------------------------------------------------------
# Making
# --------------------------------------------------------------------------------------------------


def load_generator(path: str) -> tuple[Generator, float]:
    """The generator in a best.pt, in eval mode, and its rate in Hz."""
    content = selfmis.read_checkpoint(path)
    if content.get("network") not in GENERATORS:
        raise UsageError(f"{path}: no generator in it; give best.pt of pix2pix or the like")
    generator = GENERATORS[content["network"]](**content["architecture"])
    selfmis.load_strictly(generator, content["encoder"], path)
    return generator.eval(), content["sample_rate_hz"]


def fit_filters(ecg: np.ndarray) -> np.ndarray:
    """(N, 12, T) mV -> (12, 31): the filters of lead I that come nearest to each lead."""
    gram, products = np.zeros((TAPS, TAPS)), np.zeros((TAPS, 12))
    for record in ecg.astype(np.float64):
        windows = filter_windows(record[0])  # (T, 31)
        gram += windows.T @ windows
        products += windows.T @ record.T
    return np.linalg.solve(gram + 1e-9 * np.trace(gram) * np.eye(TAPS), products).T


def filter_windows(lead: np.ndarray) -> np.ndarray:
    """(T,) -> (T, 31): the samples round each, zeros beyond the ends."""
    padded = np.pad(lead, TAPS // 2)
    return np.lib.stride_tricks.sliding_window_view(padded, TAPS)


def apply_filters(lead: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """(T,), (12, 31) -> (12, T), lead I as it was."""
    made = filters @ filter_windows(lead).T
    made[0] = lead
    return made


@torch.no_grad()
def make(flags: argparse.Namespace) -> None:
    (source,) = flags.sources
    if source == "fir":
        rate_hz = flags.sample_rate
        records = selfmis.find_records(flags.data, sample_rate_hz=rate_hz)
        trains = (records.folds != flags.val_fold) & (records.folds != flags.test_fold)
        rows = np.random.default_rng(0).permutation(np.flatnonzero(trains))[:FIT_RECORDS]
        filters = fit_filters(read_mv(records[rows], rate_hz))
    else:
        generator, rate_hz = load_generator(source)
    records = test_records(flags, rate_hz)
    real = read_mv(records, rate_hz)
    if source == "fir":
        made = [apply_filters(ecg[0], filters) for ecg in real]
    else:
        made = [generator(torch.from_numpy(ecg[None, :1]))[0].numpy() for ecg in real]
    flags.out.mkdir(parents=True, exist_ok=True)
    np.save(flags.out / "generated.npy", np.stack(made).astype(np.float32))
    names = [records.name(i) for i in range(len(records))]
    content = dict(source=source, sample_rate_hz=rate_hz, leads=LEADS, records=names)
    selfmis.write_json(flags.out / "generated.json", content)
    print(f"{flags.out / 'generated.npy'}: {len(made):,} records")


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------


class Likeness(NamedTuple):
    """How near made leads (N, 12, T) are to real ones; a number a lead, (12,)."""

    error: np.ndarray  # mean square, mV^2
    correlation: np.ndarray  # Pearson's, mean over records
    variance: np.ndarray  # made over real, of all records together


def likeness(real: np.ndarray, made: np.ndarray) -> Likeness:
    real, made = real.astype(np.float64), made.astype(np.float64)
    error = np.square(made - real).mean((0, 2))
    a = real - real.mean(2, keepdims=True)
    b = made - made.mean(2, keepdims=True)
    norms = np.sqrt(np.square(a).sum(2) * np.square(b).sum(2))  # (N, 12)
    correlation = np.divide((a * b).sum(2), norms, out=np.zeros_like(norms), where=norms > 0)
    variance = np.square(b).mean((0, 2)) / np.square(a).mean((0, 2))
    return Likeness(error, correlation.mean(0), variance)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) of two sets of embeddings (N, D)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    S1, S2 = np.cov(a.T, bias=True), np.cov(b.T, bias=True)
    values, vectors = np.linalg.eigh(S1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ S2 @ root)
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    return float(apart + np.trace(S1) + np.trace(S2) - 2 * np.sqrt(inner.clip(0)).sum())


def embed_all(encoder, ecg: np.ndarray) -> torch.Tensor:
    """(N, 12, T) in mV -> (N, D), preprocessed as real records are."""
    options = dict(sample_rate_hz=encoder.sample_rate_hz, **encoder.preprocessing)
    signals = np.stack([selfmis.preprocess(one, **options) for one in ecg])
    return selfmis.embed(encoder, torch.from_numpy(signals), torch.device("cpu"))


def read_made(folder: Path, records: Records, rate_hz: float) -> np.ndarray:
    """generated.npy of a folder; UsageError if it is of other records or another rate."""
    try:
        content = json.loads((folder / "generated.json").read_text())
    except OSError as error:
        raise UsageError(f"{folder}: no generated.json; start with `make`") from error
    names = [records.name(i) for i in range(len(records))]
    if [Path(name).name for name in content["records"]] != [Path(name).name for name in names]:
        raise UsageError(f"{folder}: of other records than this test fold")
    if content["sample_rate_hz"] != rate_hz:
        raise UsageError(f"{folder}: {content['sample_rate_hz']:g} Hz, the probe {rate_hz:g} Hz")
    return np.load(folder / "generated.npy")


def score(flags: argparse.Namespace) -> None:
    if not flags.probe:
        raise UsageError("score needs --probe, probe.pt of a twelve-lead encoder")
    encoder = selfmis.load_encoder(flags.probe)
    if encoder.lead != "all":
        raise UsageError(f"{flags.probe}: a probe of lead {encoder.lead}; give one of --lead all")
    records = test_records(flags, encoder.sample_rate_hz)
    real = read_mv(records, encoder.sample_rate_hz)
    shown = {"real leads": real}
    for folder in flags.sources:
        shown[Path(folder).name] = read_made(Path(folder), records, encoder.sample_rate_hz)
    shown["lead I in all rows"] = np.repeat(real[:, :1], 12, 1)
    embedded = {name: embed_all(encoder, ecg) for name, ecg in shown.items()}
    embedded["lead I and zeros"] = embed_lead_I(encoder, real)

    weight, bias = selfmis.read_checkpoint(flags.probe)["head"]
    results = {}
    for name, z in embedded.items():
        logits = train_probe.score(z, weight, bias)
        auc, draws = train_probe.mean_auc([logits], records.labels, records.patient_keys())
        results[name] = Scores(auc, draws, records.labels, [])
    half = np.random.default_rng(0).permutation(len(real)) % 2 == 0
    z_real = embedded["real leads"].numpy()
    lines = [["leads", *MEANS.values(), "six minus real", "mV^2", "r", "variance", "FID"]]
    for name, own in results.items():
        line = [name, *(own.cell(group) for group in MEANS)]
        is_real = name == "real leads"
        line.append("" if is_real else difference(own, results["real leads"], "six"))
        line += likeness_cells(real, shown.get(name) if not is_real else None)
        pair = (z_real[half], z_real[~half]) if is_real else (z_real, embedded[name].numpy())
        lines.append([*line, f"{frechet_distance(*pair):.3g}"])
    print_table("Generated leads (FID of real leads: one half of the fold to the other)", lines)
    if flags.picture:
        draw_picture(flags.picture, shown, embedded, records)


def embed_lead_I(encoder, ecg: np.ndarray) -> torch.Tensor:
    """(N, 12, T) in mV -> (N, D) of lead I, scored by itself, beside eleven rows of zeros."""
    options = dict(sample_rate_hz=encoder.sample_rate_hz, **encoder.preprocessing)
    single = np.stack([selfmis.preprocess(one[:1], **options) for one in ecg])
    signals = selfmis.with_empty_leads(torch.from_numpy(single), encoder, "I")
    return selfmis.embed(encoder, signals, torch.device("cpu"))


def likeness_cells(real: np.ndarray, made: np.ndarray | None) -> list[str]:
    if made is None:
        return ["", "", ""]
    found = likeness(real, made)
    return [f"{values[MADE].mean():.3g}" for values in found]


def draw_picture(path: str, shown: dict, embedded: dict, records: Records) -> None:
    """Lead V1 of the first infarct, real and made; and two principal components of the latents."""
    figure = import_optional("matplotlib.figure", "drawing").Figure((10, 4), layout="constrained")
    signal, latent = figure.subplots(1, 2)
    row = int(np.flatnonzero(records.labels[:, train_probe.NINE].any(1))[0])
    T = shown["real leads"].shape[2]
    seconds = np.arange(T // 4) / (T / 10)
    for name, ecg in shown.items():
        if name != "lead I in all rows":
            colour = "black" if name == "real leads" else None
            v1 = ecg[row, LEADS.index("V1"), : len(seconds)]
            signal.plot(seconds, v1, label=name, color=colour, lw=1)
    signal.set(title=f"V1 of {Path(records.name(row)).name}", xlabel="s", ylabel="mV")
    signal.legend(fontsize=8)
    z = embedded["real leads"]
    mean = z.mean(0)
    axes = torch.linalg.svd(z - mean, full_matrices=False).Vh[:2]  # (2, D)
    for name, z in embedded.items():
        points = (z - mean) @ axes.T
        colour = "black" if name == "real leads" else None
        latent.plot(*points.T, ".", ms=2, label=name, color=colour, alpha=0.5)
    latent.set(title="embeddings", xlabel="first component of the real ones", ylabel="second")
    latent.legend(fontsize=8, markerscale=4)
    save_picture(figure, path)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    name = "python -m extras.baselines.generated"
    parser = argparse.ArgumentParser(
        name, None, __doc__, allow_abbrev=False, formatter_class=layout
    )
    add = parser.add_argument
    add("part", choices=("make", "score"))
    add("sources", nargs="+", metavar="best.pt|fir|FOLDER", help="folders: of generated.npy")
    add("--data", required=True, metavar="PTBXL", help="a folder")
    add("--out", type=Path, default=Path("runs/generated"), help="of make")
    add("--val-fold", type=int, default=9, help="default: 9")
    add("--test-fold", type=int, default=10, help="default: 10")
    add("--sample-rate", type=float, default=500.0, help="of fir; default: 500")
    add("--probe", help="of score: probe.pt of a twelve-lead encoder on --lead all")
    add("--picture", metavar="FILE", help="of score: draws V1 and the latents")
    run_command(lambda flags: dict(make=make, score=score)[flags.part](flags), parser, argv)


if __name__ == "__main__":
    main()
