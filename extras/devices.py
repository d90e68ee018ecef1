"""How encoders and detectors do on recordings of other devices than those that trained them.

    python -m extras.devices rhythm FOLDER --encoder aligned=runs/aligned/best.pt --encoder random
    python -m extras.devices alarms FOLDER --probe aligned=runs/aligned-probe/probe.pt
    python -m extras.devices band PTBXL --fold 8 --probe aligned=runs/aligned-probe/probe.pt
    python -m extras.devices retrieval FOLDER --encoder runs/a/best.pt --teacher runs/t/best.pt

FOLDER holds WFDB records whose leads have their names (in those of the PhysioNet/CinC Challenge of
2017 lead I is called ECG: sed -i 's/ ECG/ I/' *.hea) and, beside them, REFERENCE.csv or
QUALITY.csv: a record and its label in each line (of that Challenge: N normal, A atrial
fibrillation, O other, ~ noisy).  Ten seconds of each record count.  No label of a device trains
anything but the heads of `rhythm`.

rhythm:    a linear head on the frozen encoder tells A from N, in five parts of the records: three
           train it, one chooses its strength, one tests it; the mean of the five AUCs.
           NAME=PATH,PATH,... is a row, the mean over its files (seeds); differences are to the
           first row, paired by record.
alarms:    how often a detector calls "any infarct" at its own threshold, by label, and how often
           detect would warn; below that how often in the groups of its own validation fold.  N is
           a normal rhythm, not a healthy heart: the group without infarct compares best.
band:      how often, of a fold of PTB-XL, behind a filter or under noise that a device may have
           (but for the noise they are of the kinds that extras/recorders.py trains with), of the
           first seconds alone, and where a wrong sample rate is given.
retrieval: how often, among 200 records, lead I of one is nearest to its own twelve leads.
"""

import argparse
import csv
import functools
from pathlib import Path

import numpy as np
import torch

import selfmis
import train_probe
from extras import command_parser, run_action
from extras.detect import Detector, infarct_probability, load_detector, operating_point
from extras.evidence import print_table
from extras.recorders import high_pass, low_pass
from extras.recordings import check_recording, fill_gaps
from selfmis import LEADS, MI_TYPES, STATEMENTS, Records, ResNet1D, UsageError
from train_probe import MINIMUM_POSITIVES

HEAD_PARTS = 5  # of the records, in which heads of `rhythm` are trained and tested
AMONG = 200  # records that retrieval compares, so that collections of any size compare


@functools.cache
def find_labelled(folder: Path, fold: int | None, rate_hz: float) -> tuple[Records, np.ndarray]:
    """The records of a folder (of PTB-XL those of a fold) and the label of each, "" if unknown.

    rate_hz decides which of PTB-XL's files are read.
    """
    records = selfmis.find_records(str(folder), sample_rate_hz=rate_hz)
    if fold is not None:
        records = records[records.folds == fold]
        if not len(records):
            raise UsageError(f"--fold {fold}: {folder} has no record in it")
    labels = {}
    for name in ("REFERENCE.csv", "QUALITY.csv"):
        if (folder / name).is_file():
            with open(folder / name, newline="") as file:
                labels |= {row[0]: row[1] for row in csv.reader(file) if len(row) > 1}
    names = [Path(records.name(i)).name for i in range(len(records))]
    return records, np.array([labels.get(name, "") for name in names])


@functools.cache
def read_all(folder: Path, fold: int | None, leads: tuple, rate_hz: float) -> list[np.ndarray]:
    """(L, T) in mV of each record."""
    records, _ = find_labelled(folder, fold, rate_hz)
    ecgs = [records.read(i, leads, rate_hz) for i in range(len(records))]
    for i, ecg in enumerate(ecgs):
        refuse_short(records.name(i), ecg, rate_hz)
    return ecgs


def refuse_short(name: str, ecg: np.ndarray, rate_hz: float) -> None:
    """UsageError that names the record, before hours of work."""
    seconds = ecg.shape[1] / rate_hz
    if seconds < selfmis.MINIMUM_SECONDS:
        needed = f"{selfmis.MINIMUM_SECONDS} s are needed"
        raise UsageError(f"{name}: {seconds:.2f} s of ECG is too short, {needed}; take it out")


def embed_recordings(encoder: ResNet1D, ecgs, lead: str = "I") -> torch.Tensor:
    """Recordings (L, T) in mV at the encoder's rate, made ready as it asks -> (N, D) on the CPU.

    L: 1, of this lead, which a 12-lead encoder gets beside rows of zeros, or 12.
    """
    # ECGFounder's file does not say how its input was made.
    options = dict(sample_rate_hz=encoder.sample_rate_hz, **(encoder.preprocessing or {}))
    signals = np.stack([selfmis.preprocess(ecg, **options) for ecg in ecgs])  # (N, L, T)
    parts = []
    for part in torch.from_numpy(signals).split(1024):  # of all, the zeros would fill the memory
        shown = selfmis.with_empty_leads(part, encoder, lead)
        parts.append(selfmis.embed(encoder, shown, torch.device("cpu")))
    return torch.cat(parts)


def embeddings(encoder: ResNet1D, folder: Path, lead: str, fold: int | None = None) -> torch.Tensor:
    """(N, D) of all records of a folder; lead: the one that is shown, or all."""
    leads = LEADS if lead == "all" else (lead,)
    ecgs = read_all(folder, fold, leads, encoder.sample_rate_hz)
    return embed_recordings(encoder, ecgs, lead)


def named(text: str) -> tuple[str, list[str]]:
    """'aligned=a.pt,b.pt' -> aligned, [a.pt, b.pt]; a path may hold = too, and is its own name."""
    name, equals, paths = text.partition("=")
    if not equals or "/" in name:
        return text, [text]
    return name, paths.split(",")


# --------------------------------------------------------------------------------------------------
# Atrial fibrillation
# --------------------------------------------------------------------------------------------------


def open_encoders(rows: list[str]) -> list[tuple[str, list[ResNet1D]]]:
    """Names and encoders; `random` is one with random weights, built as the first file's."""
    paths = [named(row) for row in rows]
    files = [path for _, row in paths for path in row if path != "random"]
    if not files:
        raise UsageError("--encoder random: name a file too, after whose encoder it is built")
    opened = []
    for row, names in paths:
        encoders = []
        for seed, name in enumerate(names):
            encoder = selfmis.load_encoder(files[0] if name == "random" else name)
            if name == "random":
                torch.manual_seed(seed)
                fresh = type(encoder)(**encoder.architecture | dict(leads=1)).eval()
                fresh.sample_rate_hz = encoder.sample_rate_hz
                fresh.preprocessing = encoder.preprocessing
                encoder = fresh
            encoders.append(encoder)
        opened.append((row, encoders))
    return opened


def held_out_auc(x: torch.Tensor, y: np.ndarray) -> tuple[float, np.ndarray]:
    """(N, D) features, (N,) 0 or 1 -> mean AUC over the parts, each of which its head has not seen.

    And the same in 1000 resamples of each part, (1000,).  Scores of different heads are not
    compared: their strengths differ, and so do their scales.
    """
    part = np.random.default_rng(0).permutation(len(y)) % HEAD_PARTS
    target = torch.from_numpy(y[:, None].astype(np.float32))
    aucs, draws = [], []
    for test in range(HEAD_PARTS):
        val = (test + 1) % HEAD_PARTS
        train = (part != test) & (part != val)
        weight, bias, _ = train_probe.logistic_head(
            x[train],
            target[train],
            x[part == val],
            target[part == val],
            train_probe.ProbeConfig(),
            0,
        )
        logits = train_probe.score(x[part == test], weight, bias)[:, 0]
        aucs.append(selfmis.roc_auc(y[part == test], logits))
        draws.append(selfmis.bootstrap_auc(y[part == test, None], logits[:, None])[:, 0])
    return np.mean(aucs), np.mean(draws, 0)


def print_rhythm(flags: argparse.Namespace) -> None:
    folder = flags.folder
    lines = [["frozen encoder", "files", "AUC, A against N", "minus the first"]]
    _, labels = find_labelled(folder, flags.fold, 100)
    chosen = np.flatnonzero((labels == "A") | (labels == "N"))
    y = (labels[chosen] == "A").astype(int)
    if min(y.sum(), len(y) - y.sum()) < MINIMUM_POSITIVES:
        found = f"{y.sum()} records labelled A and {len(y) - y.sum()} labelled N"
        raise UsageError(f"{folder}: {found} in REFERENCE.csv; {MINIMUM_POSITIVES} each are needed")
    first = None
    for row, encoders in open_encoders(flags.encoder):
        z = [embeddings(encoder, folder, "I", flags.fold)[chosen] for encoder in encoders]
        results = [held_out_auc(each, y) for each in z]
        auc, draw = (np.mean(values, 0) for values in zip(*results, strict=True))
        line = [row, len(encoders), with_interval(auc, draw, "{:.3f}"), ""]
        if first is not None:
            line[3] = with_interval(auc - first[0], draw - first[1], "{:+.3f}")
        first = first or (auc, draw)
        lines.append(line)
    print_table(f"Atrial fibrillation, {y.sum():,} of {len(y):,} recordings", lines)


def with_interval(value: float, draws: np.ndarray, form: str) -> str:
    low, high = selfmis.interval(draws)
    return f"{form} ({form} to {form})".format(value, low, high)


# --------------------------------------------------------------------------------------------------
# Alarms
# --------------------------------------------------------------------------------------------------


def print_alarms(flags: argparse.Namespace) -> None:
    records, labels = find_labelled(flags.folder, flags.fold, 100)
    signals = read_filled(records, range(len(records)))
    warnings = [check_recording(ecg, rate_hz, ("I",)) for ecg, rate_hz in signals]
    points_down = np.array([any("points down" in text for text in one) for one in warnings])
    is_noisy = np.array([any("is noisy" in text for text in one) for one in warnings])
    is_warned = np.array([bool(one) for one in warnings])
    lines = [["label", "recordings", "points down", "noisy", "any warning"]]
    groups = {label or "no label": labels == label for label in sorted(set(labels))}
    for label, group in groups.items():
        shares = [f"{flag[group].mean():.1%}" for flag in (points_down, is_noisy, is_warned)]
        lines.append([label, int(group.sum()), *shares])
    print_table("Warnings of detect", lines)

    lines = [
        ["detector", "label", "positive", "of those not noisy", "pointing up", "pointing down"]
    ]
    for row, paths in map(named, flags.probe):
        is_positive = np.mean([verdicts(path, signals) for path in paths], 0)  # over seeds
        for label, group in groups.items():
            parts = (group, group & ~is_noisy, group & ~points_down, group & points_down)
            lines.append([row, label, *(share(is_positive[part]) for part in parts)])
        for group, rate in rates_at_home(paths).items():
            lines.append([row, f"validation fold: {group}", f"{rate:.1%}", "", "", ""])
    print_table('Called "any infarct" at a specificity of 90 % on the validation fold', lines)


def read_filled(records: Records, rows) -> list[tuple[np.ndarray, float]]:
    """Ten seconds of lead I (1, T) in mV and the rate, as they were stored, for a detector."""
    signals = []
    for i in rows:
        ecg, rate_hz = selfmis.read_wfdb(records.name(i), ("I",))
        refuse_short(records.name(i), ecg, rate_hz)
        ecg = ecg[:, : round(selfmis.SECONDS * rate_hz)]
        signals.append((fill_gaps(ecg, rate_hz)[0], rate_hz))
    return signals


def open_detector(path) -> tuple[Detector, dict]:
    """A detector of lead I and its operating point."""
    detector = load_detector(path)
    if detector.leads != ("I",):
        raise UsageError(f"{path}: a detector of {' '.join(detector.leads)}, not of lead I")
    point = operating_point(detector.content)
    if point["threshold"] is None:
        raise UsageError(f"{path}: {point['no_verdict']}")
    return detector, point


def verdicts(path, signals: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """(N,) 1 where the detector of a probe.pt calls "any infarct", 0 where not, NaN if flat."""
    detector, point = open_detector(path)
    # Each as one of several, so that a flat one is no error.
    scores = [infarct_probability(detector(ecg[None], rate_hz)) for ecg, rate_hz in signals]
    scores = np.concatenate(scores)
    return np.where(np.isnan(scores), np.nan, scores >= point["threshold"])


def rates_at_home(paths: list[str]) -> dict[str, float]:
    """{group: share that is positive} of the validation folds, mean over the detectors."""
    rates = {}
    for detector, point in map(open_detector, paths):
        validation = detector.content["validation"]
        is_positive = (validation["any_infarct"] >= point["threshold"]).double()
        infarct, normal = validation["infarct"], validation["normal"]
        groups = {"normal": normal, "no infarct": ~infarct, "infarct": infarct}
        for name, group in groups.items():
            rates.setdefault(name, []).append(float(is_positive[group].mean()))
    return {name: float(np.mean(values)) for name, values in rates.items()}


def share(values: np.ndarray) -> str:
    return f"{np.nanmean(values):.1%}" if len(values) else ""


# --------------------------------------------------------------------------------------------------
# Band
# --------------------------------------------------------------------------------------------------


def disturbances(T: int, rate_hz: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{name: (response, noise)}, (T // 2 + 1,) each.

    The record's spectrum is multiplied by the first; the second is the amplitude of a noise's
    spectrum, in deviations of the record.
    """
    hz = torch.fft.rfftfreq(T, 1 / rate_hz)
    same, none = torch.ones_like(hz), torch.zeros_like(hz)
    table = {"as it is": (same, none)}
    for cutoff in (0.5, 1):
        table[f"high-pass, {cutoff} Hz"] = high_pass(hz, cutoff), none
    for cutoff in (30, 20, 15):
        table[f"low-pass, {cutoff} Hz"] = low_pass(hz, cutoff), none
    table["upside down"] = -same, none
    table["noise, 5 to 40 Hz, a fifth"] = same, 0.2 * in_band(hz, 5, 40)
    table["wander, 0.2 to 1.5 Hz, as much"] = same, in_band(hz, 0.2, 1.5)
    return table


def in_band(hz: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """(T // 2 + 1,) -> amplitudes that turn white noise of deviation 1 into such noise."""
    inside = ((hz >= low) & (hz <= high)).float()
    return inside / inside.mean().sqrt()


def disturb(ecg: np.ndarray, response: torch.Tensor, noise: torch.Tensor, draw) -> np.ndarray:
    """(1, T) mV -> (1, T) mV."""
    x = torch.from_numpy(ecg)
    white = torch.randn(x.shape, generator=draw, dtype=x.dtype)
    spectrum = response * torch.fft.rfft(x) + x.std() * noise * torch.fft.rfft(white)
    return torch.fft.irfft(spectrum, n=x.shape[1]).numpy()


def print_band(flags: argparse.Namespace) -> None:
    if flags.fold is None:
        raise UsageError("band needs --fold: a fold of PTB-XL that did not train the detector")
    records, _ = find_labelled(flags.folder, flags.fold, 100)
    infarct = records.labels[:, [STATEMENTS.index(t) for t in MI_TYPES]].any(1)
    normal = (records.labels[:, STATEMENTS.index("NORM")] > 0) & ~infarct
    lines = [["detector", "recordings", "normal, positive", "infarct, positive"]]
    for row, paths in map(named, flags.probe):
        shares = {}
        for path in paths:
            for name, is_positive in positives_behind(path, flags).items():
                shares.setdefault(name, []).append(is_positive)
        for name, parts in shares.items():
            is_positive = np.mean(parts, 0)  # over seeds
            lines.append([row, name, share(is_positive[normal]), share(is_positive[infarct])])
    counts = f"{normal.sum():,} normal records and {infarct.sum():,} infarcts"
    print_table(f'Called "any infarct" of {counts} of fold {flags.fold}', lines)


def positives_behind(path: str, flags: argparse.Namespace) -> dict[str, np.ndarray]:
    """{disturbance: (N,) whether the detector calls "any infarct"} of the records of a fold."""
    detector, point = open_detector(path)
    rate_hz = detector.sample_rate_hz
    ecgs = read_all(flags.folder, flags.fold, ("I",), rate_hz)
    scores = {}
    for name, parts in disturbances(ecgs[0].shape[1], rate_hz).items():
        draw = torch.Generator().manual_seed(0)
        disturbed = np.stack([disturb(ecg, *parts, draw) for ecg in ecgs])
        scores[name] = infarct_probability(detector(disturbed, rate_hz))
    whole = np.stack(ecgs)
    for seconds in (6, 4):
        first = whole[:, :, : round(seconds * rate_hz)]
        scores[f"its first {seconds} s"] = infarct_probability(detector(first, rate_hz))
    for name, factor in (("half", 0.5), ("twice", 2)):
        wrong = infarct_probability(detector(whole, factor * rate_hz))
        scores[f"a rate of {name} the true one"] = wrong
    return {name: score >= point["threshold"] for name, score in scores.items()}


# --------------------------------------------------------------------------------------------------
# Retrieval
# --------------------------------------------------------------------------------------------------


def print_retrieval(flags: argparse.Namespace) -> None:
    paths = [path for _, row in map(named, flags.encoder) for path in row]
    if len(paths) > 1:
        raise UsageError(f"retrieval: {len(paths)} encoders; give the one that --teacher taught")
    single, teacher = selfmis.load_encoder(paths[0]), selfmis.load_encoder(flags.teacher)
    _, labels = find_labelled(flags.folder, flags.fold, single.sample_rate_hz)
    z_single = embeddings(single, flags.folder, single.lead, flags.fold)
    z_multi = embeddings(teacher, flags.folder, "all", flags.fold)
    lines = [["label", "records", f"groups of {AMONG}", "R@1", "R@5", "R@10"]]
    for label in sorted(set(labels)):
        rows = np.random.default_rng(0).permutation(np.flatnonzero(labels == label))
        groups = [rows[i : i + AMONG] for i in range(0, len(rows) - AMONG + 1, AMONG)]
        if not groups:
            continue
        found = [selfmis.retrieval(z_single[g], z_multi[g]) for g in groups]
        recalls = [f"{np.mean([each[k] for each in found]):.1f} %" for k in (1, 5, 10)]
        lines.append([label or "no label", len(rows), len(groups), *recalls])
    if len(lines) == 1:
        raise UsageError(f"{flags.folder}: fewer than {AMONG} records of each label; too few")
    print_table(f"Retrieval among {AMONG}, chance {100 / AMONG} %, {flags.folder.name}", lines)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


COMMANDS = {  # what each does, and the flags it needs
    "rhythm": (print_rhythm, "encoder"),
    "alarms": (print_alarms, "probe"),
    "band": (print_band, "probe"),
    "retrieval": (print_retrieval, "encoder", "teacher"),
}


def run_devices(flags: argparse.Namespace) -> None:
    action, *needed = COMMANDS[flags.command]
    for name in needed:
        if not getattr(flags, name):
            raise UsageError(f"{flags.command} needs --{name}")
    action(flags)


def main(argv=None) -> None:
    parser = command_parser("extras.devices", __doc__)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("folder", type=Path, help="of WFDB records")
    add(
        "--encoder",
        action="append",
        default=[],
        metavar="[NAME=]PATH[,PATH]",
        help="a row; repeat it",
    )
    add("--probe", action="append", default=[], metavar="[NAME=]PROBE.pt", help="likewise")
    add("--teacher", metavar="PATH", help="the encoder of twelve leads")
    add("--fold", type=int, help="of PTB-XL: its records alone")
    run_action(run_devices, parser.parse_args(argv))


if __name__ == "__main__":
    main()
