"""Eleven leads made out of lead I: writes them, and scores them as a record (Table 2, Fig. 1).

    python -m extras.baselines.generated make runs/pix2pix/best.pt --data ptb-xl --out runs/pix2pix
    python -m extras.baselines.generated make fir --sample-rate 100 --data ptb-xl --out runs/fir
    python -m extras.baselines.generated score runs/pix2pix runs/fir --data ptb-xl \\
        --probe runs/teacher-frozen/probe.pt --picture generated.png
    python -m extras.baselines.generated chart runs/pix2pix --data ptb-xl --picture chart.png

make:  OUT/generated.npy, (N, 12, T) float32 in mV, the leads in the order of LEADS and lead I as it
       was, of the labelled records of the test fold; OUT/generated.json names them.  `fir` is a
       filter of 0.31 s for each lead, least squares on the records of the training folds.
score: a twelve-lead classifier whose head was fitted on real leads (probe.pt of a teacher, --lead
       all; the head that was better on the validation fold) ranks them, beside real leads, lead I
       with zeros, and lead I in all rows.  mV^2 is the mean squared error, r Pearson's correlation
       of a record's lead, both means over the eleven leads that were made.  FID is the Frechet
       distance of one half of the patients, made, to the embeddings of the other half, real; for
       real leads that is what chance alone makes.  Then r, and the variance of what was made over
       that of what was recorded, lead by lead.
chart: the first infarct of the test fold on ECG paper, as it was recorded and as it was made.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import selfmis
import train_probe
from extras import command_parser, make_folder, run_action
from extras.baselines.gan import LEAD_I, Generator, UNetGenerator
from extras.baselines.mcma import MCMAGenerator
from extras.detect import PROBE_KEYS
from extras.devices import embed_recordings
from extras.evidence import MEANS, Scores, difference, print_table
from extras.synthetic import CHART_MM, draw_chart, ecg_paper, save_picture
from selfmis import LEADS, Records, SelfCuttingDataset, UsageError, import_optional

GENERATORS = {network.__name__: network for network in (UNetGenerator, MCMAGenerator)}
FILTER_SECONDS = 0.31
FIT_RECORDS = 2000  # of the training folds, for the filter
CONTENT = "generated.json"  # written when all is made
MADE = [i for i in range(12) if i != LEAD_I]
PAPER = {"pix2pix": "64.6", "cyclegan": "55.4", "ekgan": "60.4", "mcma": "76.2"}  # nine-type mean


def test_records(flags: argparse.Namespace, rate_hz: float) -> Records:
    """The labelled records of the test fold."""
    records = selfmis.find_records(flags.data, sample_rate_hz=rate_hz)
    records = records[records.labels.any(1) & (records.folds == flags.test_fold)]
    if not len(records):
        raise UsageError(f"{flags.data}: no labelled record in fold {flags.test_fold}")
    return records


def read_mv(records: Records, rate_hz: float) -> np.ndarray:
    """(N, 12, T) float32 in mV, ten seconds each."""
    dataset = SelfCuttingDataset(
        records, "all", sample_rate_hz=rate_hz, multi=False, normalize="none"
    )
    return np.stack([ecg.numpy() for ecg, _ in dataset])


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
    generator.training_data = content["training_data"]
    return generator.eval(), content["sample_rate_hz"]


def training_filters(flags: argparse.Namespace, rate_hz: float) -> np.ndarray:
    """`fit_filters` of FIT_RECORDS records of the training folds: (12, taps)."""
    records = selfmis.find_records(flags.data, sample_rate_hz=rate_hz)
    trains = (records.folds != flags.val_fold) & (records.folds != flags.test_fold)
    rows = np.random.default_rng(0).permutation(np.flatnonzero(trains))[:FIT_RECORDS]
    taps = 2 * round(FILTER_SECONDS * rate_hz / 2) - 1
    return fit_filters(read_mv(records[rows], rate_hz), taps)


def fit_filters(ecg: np.ndarray, taps: int) -> np.ndarray:
    """(N, 12, T) mV -> (12, taps): the filters of lead I that come nearest to each lead."""
    gram, products = np.zeros((taps, taps)), np.zeros((taps, 12))
    for record in ecg:
        record = record.astype(np.float64)
        windows = filter_windows(record[LEAD_I], taps)  # (T, taps)
        gram += windows.T @ windows
        products += windows.T @ record.T
    return np.linalg.solve(gram + 1e-9 * np.trace(gram) * np.eye(taps), products).T


def filter_windows(lead: np.ndarray, taps: int) -> np.ndarray:
    """(T,) -> (T, taps): the samples round each, zeros beyond the ends; taps is odd."""
    return np.lib.stride_tricks.sliding_window_view(np.pad(lead, taps // 2), taps)


def apply_filters(lead: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """(T,), (12, taps) -> (12, T) float32, lead I as it was."""
    made = (filters @ filter_windows(lead, filters.shape[1]).T).astype(np.float32)
    made[LEAD_I] = lead
    return made


@torch.no_grad()
def make(flags: argparse.Namespace) -> None:
    if len(flags.sources) > 1:
        raise UsageError(f"make {' '.join(flags.sources)}: one at a time")
    source = flags.sources[0]
    make_folder(flags.out)
    if source == "fir":
        rate_hz = flags.sample_rate
        filters = training_filters(flags, rate_hz)
        records = test_records(flags, rate_hz)
        made = [apply_filters(ecg[LEAD_I], filters) for ecg in read_mv(records, rate_hz)]
    else:
        generator, rate_hz = load_generator(source)
        records = test_records(flags, rate_hz)
        warn_of_seen(generator, records)
        leads = torch.from_numpy(read_mv(records, rate_hz)[:, [LEAD_I]])  # (N, 1, T)
        made = [generator(lead[None])[0].numpy() for lead in leads]
    (flags.out / CONTENT).unlink(missing_ok=True)
    np.save(flags.out / "generated.npy", np.stack(made))
    names = [records.name(i) for i in range(len(records))]
    content = dict(source=source, sample_rate_hz=rate_hz, leads=LEADS, records=names)
    selfmis.write_json(flags.out / CONTENT, content)  # last: it says that all is there
    print(f"{flags.out / 'generated.npy'}: {len(made):,} records")


def warn_of_seen(network, records: Records) -> None:
    """Say so where test records trained or chose the network."""
    for warning in train_probe.test_set_warnings(network, records):
        print(f"warning: {warning}")


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------


class Likeness(NamedTuple):
    """How near made leads (N, 12, T) are to real ones; a number a lead, (12,)."""

    error: np.ndarray  # mean square, mV^2
    correlation: np.ndarray  # Pearson's, mean over records
    variance: np.ndarray  # made over real, of all records together


def likeness(real: np.ndarray, made: np.ndarray) -> Likeness:
    errors, correlations, variances = [], [], []
    for a, b in zip(real, made, strict=True):  # one by one: a fold at 500 Hz is large
        a, b = a.astype(np.float64), b.astype(np.float64)  # (12, T)
        errors.append(np.square(b - a).mean(1))
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        norms = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))  # (12,); 0 for a flat lead
        correlations.append((a * b).sum(1) / np.where(norms > 0, norms, 1))
        variances.append((np.square(b).mean(1), np.square(a).mean(1)))
    made_variance, real_variance = np.sum(variances, 0)
    variance = made_variance / real_variance
    return Likeness(np.mean(errors, 0), np.mean(correlations, 0), variance)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) of two sets of embeddings (N, D)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    S1, S2 = np.cov(a.T, bias=True), np.cov(b.T, bias=True)
    values, vectors = np.linalg.eigh(S1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ S2 @ root)
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    return float(apart + np.trace(S1) + np.trace(S2) - 2 * np.sqrt(inner.clip(0)).sum())


def read_content(folder: Path) -> dict:
    """What a folder that `make` has filled says of itself."""
    try:
        return json.loads((folder / CONTENT).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: no {CONTENT} that can be read; start with `make`") from error


def read_made(folder: Path, records: Records, rate_hz: float) -> np.ndarray:
    """generated.npy of a folder; UsageError if it is of other records or another rate."""
    content = read_content(folder)
    names = [records.name(i) for i in range(len(records))]
    if [Path(name).name for name in content["records"]] != [Path(name).name for name in names]:
        raise UsageError(f"{folder}: of other records than this test fold")
    if content["sample_rate_hz"] != rate_hz:
        raise UsageError(f"{folder}: {content['sample_rate_hz']:g} Hz, the probe {rate_hz:g} Hz")
    return np.load(folder / "generated.npy", mmap_mode="r")


def score(flags: argparse.Namespace) -> None:
    if not flags.probe:
        raise UsageError("score needs --probe, probe.pt of a twelve-lead encoder")
    encoder = selfmis.load_encoder(flags.probe)
    if encoder.lead != "all":
        raise UsageError(f"{flags.probe}: a probe of lead {encoder.lead}; give one of --lead all")
    content = selfmis.read_checkpoint(flags.probe)
    if not PROBE_KEYS <= set(content):
        raise UsageError(f"{flags.probe}: no head in it; give probe.pt of train_probe.py")
    records = test_records(flags, encoder.sample_rate_hz)
    encoder.training_data = encoder.training_data + content["head_training_data"]
    warn_of_seen(encoder, records)
    real = read_mv(records, encoder.sample_rate_hz)
    shown = {"real leads": real}
    for folder in map(Path, flags.sources):
        name = str(folder) if folder.name in shown else folder.name
        shown[name] = read_made(folder, records, encoder.sample_rate_hz)
    shown["lead I in all rows"] = np.broadcast_to(real[:, [LEAD_I]], real.shape)
    embedded = {name: embed_recordings(encoder, ecg) for name, ecg in shown.items()}
    embedded["lead I and zeros"] = embed_recordings(encoder, real[:, [LEAD_I]])

    weight, bias = content["head"]
    results = {}
    for name, z in embedded.items():
        logits = train_probe.score(z, weight, bias)
        auc, draws = train_probe.mean_auc([logits], records.labels, records.patient_keys())
        results[name] = Scores(auc, draws, records.labels, records.patient_keys(), [])
    _, patient = np.unique(records.patient_keys(), return_inverse=True)
    half = np.random.default_rng(0).permutation(patient.max() + 1)[patient] % 2 == 0
    rest = embedded["real leads"][~half].numpy()
    alike = {name: likeness(real, ecg) for name, ecg in shown.items() if name != "real leads"}
    lines = [["leads", *MEANS.values(), "six minus real", "mV^2", "r", "FID", "nine, paper"]]
    for name, own in results.items():
        line = [name, *(own.cell(group) for group in MEANS)]
        other = None if name == "real leads" else results["real leads"]
        line += [difference(own, other, "six"), "", ""]
        if name in alike:
            line[-2] = f"{alike[name].error[MADE].mean():.3g}"
            line[-1] = f"{alike[name].correlation[MADE].mean():.2f}"
        line.append(f"{frechet_distance(embedded[name][half].numpy(), rest):.3g}")
        lines.append([*line, PAPER.get(name, "")])
    print_table("Generated leads", lines)
    lines = [["r / variance", *(LEADS[i] for i in MADE)]]
    for name, own in alike.items():
        cells = [f"{own.correlation[i]:.2f} / {own.variance[i]:.2f}" for i in MADE]
        lines.append([name, *cells])
    print_table("Lead by lead", lines)
    if flags.picture:
        draw_picture(flags.picture, shown, embedded, records)


def first_infarct(records: Records) -> int:
    """Its row."""
    rows = np.flatnonzero(records.labels[:, train_probe.NINE].any(1))
    if not len(rows):
        raise UsageError("--picture: shows an infarct, and the test fold has none")
    return int(rows[0])


def draw_picture(path: str, shown: dict, embedded: dict, records: Records) -> None:
    """A column for each way to make leads: V1 of the first infarct, and embeddings; real ones grey.

    The embeddings are seen in the first two principal components of the real ones.
    """
    made = [name for name in embedded if name != "real leads"]
    matplotlib = import_optional("matplotlib.figure", "drawing")
    figure = matplotlib.Figure((2.3 * len(made), 5), layout="constrained")
    panels = figure.subplots(2, len(made), sharex="row", sharey="row", squeeze=False)
    row = first_infarct(records)
    rate_hz = shown["real leads"].shape[2] / 10
    seconds = np.arange(round(2.5 * rate_hz)) / rate_hz
    z = embedded["real leads"]
    mean = z.mean(0)
    axes = torch.linalg.svd(z - mean, full_matrices=False).Vh[:2]  # (2, D)
    for (signal, latent), name in zip(panels.T, made, strict=True):
        for which, colour in (("real leads", "0.6"), (name, "tab:red")):
            if which in shown:
                v1 = shown[which][row, LEADS.index("V1"), : len(seconds)]
                signal.plot(seconds, v1, color=colour, linewidth=1)
            points = (embedded[which] - mean) @ axes.T
            latent.plot(*points.T, ".", markersize=1, color=colour)
        signal.set(title=name, xlabel="s")
        latent.set(xlabel="first component")
    panels[0, 0].set_ylabel(f"V1 of {Path(records.name(row)).name}, mV")
    panels[1, 0].set_ylabel("second component")
    save_picture(figure, path, pixels_per_mm=3)


def chart(flags: argparse.Namespace) -> None:
    """A record on ECG paper, real on the left and made on the right."""
    if not flags.picture or len(flags.sources) > 1:
        raise UsageError("chart needs one folder and --picture")
    folder = Path(flags.sources[0])
    rate_hz = read_content(folder)["sample_rate_hz"]
    records = test_records(flags, rate_hz)
    made = read_made(folder, records, rate_hz)
    row = first_infarct(records)
    real = read_mv(records[[row]], rate_hz)[0]
    name = Path(records.name(row)).name
    wide, tall = CHART_MM
    figure, axes = ecg_paper(2 * wide, tall)
    draw_chart(axes, real, rate_hz, f"{name}, as it was recorded")
    draw_chart(axes, made[row], rate_hz, f"{name}, out of lead I by {folder.name}", left=wide)
    save_picture(figure, flags.picture, pixels_per_mm=3)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    parser = command_parser("extras.baselines.generated", __doc__)
    add = parser.add_argument
    add("part", choices=("make", "score", "chart"))
    add(
        "sources",
        nargs="+",
        metavar="best.pt|fir|FOLDER",
        help="make: one of the first two; score, chart: folders that make has filled",
    )
    add("--data", required=True, metavar="PTBXL", help="a folder")
    add("--out", type=Path, default=Path("runs/generated"), help="of make")
    add("--val-fold", type=int, default=9, help="default: 9")
    add("--test-fold", type=int, default=10, help="default: 10")
    add("--sample-rate", type=float, default=500.0, help="of fir; default: 500")
    add("--probe", help="of score: probe.pt of a twelve-lead encoder on --lead all")
    add("--picture", metavar="FILE", help="score: draws V1 and the embeddings here; chart: here")
    parts = dict(make=make, score=score, chart=chart)
    run_action(lambda flags: parts[flags.part](flags), parser.parse_args(argv))


if __name__ == "__main__":
    main()
