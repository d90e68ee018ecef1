"""A person's own recording -> a calibrated answer, in words, as JSON or as a page.

    python -m extras.detect RECORDING... --probe PROBE.pt
    python -m extras.detect RECORDING --probe PROBE.pt --picture PAGE.png
    python -m extras.detect FOLDER --probe PROBE.pt --json > answers.json

    detector = load_detector("probe.pt")
    detector(ecg_mv, 512)  # {"ALMI": 0.01, ...}: probabilities of the nine types

The answer is one verdict, "any infarct", and then the nine types ranked, as a description: nine
verdicts side by side would call two in five healthy people positive for something.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import selfmis
from extras.recordings import TEXT_FILES, check_recording, fill_gaps, read_recording
from extras.synthetic import ecg_paper, save_picture
from selfmis import LEADS, MI_TYPES, RecordError, UsageError

MINIMUM_CASES = 10  # rates and shares of fewer cases mean nothing
PREVALENCE = 0.03  # 3.1 % of US adults have had an infarct (2023 guideline on coronary disease)
DISCLAIMER = "research code, not a medical device: an infarct of today needs an emergency call"

# ----------------------------------------------------------------------------------------------
# From a recording to probabilities
# ----------------------------------------------------------------------------------------------


class CalibratedClassifier(nn.Module):
    """Encoder, head and temperature: (B, L, T) -> (B, 9) probabilities in the order of MI_TYPES.

    zscore=False takes what `preprocess` returns, zscore=True 10 s in mV, which is what is exported.
    """

    def __init__(self, encoder: nn.Module, content: dict, zscore: bool = False):
        super().__init__()
        columns = [content["classes"].index(t) for t in MI_TYPES]
        weight, bias = content["head"]
        self.encoder, self.zscore = encoder, zscore
        self.lead, self.temperature = content["lead"], content["temperature"]
        self.register_buffer("weight", weight[columns])  # (9, D)
        self.register_buffer("bias", bias[columns])  # (9,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.zscore:
            x = x - x.mean((1, 2), keepdim=True)
            x = x / x.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)
        z = self.encoder(selfmis.with_empty_leads(x, self.encoder, self.lead))  # (B, D)
        return torch.sigmoid(F.linear(z, self.weight, self.bias) / self.temperature)


class Detector:
    """detector(ecg, sample_rate_hz): probabilities of the nine types; `load_detector` makes it.

    ecg: mV at any rate, one recording (T,) or (L, T), or several of one length (N, L, T); L is 1,
    or 12 for a probe of all leads. Returns {type: probability}, floats or arrays (N,). More than
    10 s are covered by windows of 10 s, spread evenly (they overlap where the length is no
    multiple); their probabilities are averaged, flat windows left out. 2.5 to 10 s are padded as
    in `preprocess`. Raises UsageError: another shape or type, too short, flat throughout.

    Attributes: leads, sample_rate_hz, preprocessing; content, the whole checkpoint.
    """

    def __init__(self, path):
        self.content = selfmis.read_checkpoint(path)
        if "validation" not in self.content:
            remedy = "give a probe.pt of train_probe.py (of an old version: probe again)"
            raise UsageError(f"{path}: no calibrated head in it; {remedy}")
        encoder = selfmis.load_encoder(path)
        self.leads = LEADS if encoder.lead == "all" else (encoder.lead,)
        self.sample_rate_hz, self.preprocessing = encoder.sample_rate_hz, encoder.preprocessing
        self.classifier = CalibratedClassifier(encoder, self.content).eval()

    def __call__(self, ecg, sample_rate_hz: float) -> dict:
        ecg = self.as_numbers(ecg)
        batch = ecg.reshape((1,) * (3 - ecg.ndim) + ecg.shape)  # (N, L, T)
        means = np.stack([self.mean_probability(one, sample_rate_hz) for one in batch])  # (N, 9)
        if ecg.ndim == 3:
            return dict(zip(MI_TYPES, means.T, strict=True))
        return dict(zip(MI_TYPES, means[0].tolist(), strict=True))

    def as_numbers(self, ecg) -> np.ndarray:
        """ecg as float64, or the sentence that says what is expected."""
        try:
            array = np.asarray(ecg)
        except ValueError as error:  # lists of different lengths
            raise UsageError("a recording of several lengths: expected one array") from error
        L = len(self.leads)
        fits = array.ndim in (2, 3) and array.shape[-2] == L or array.ndim == L == 1
        if not fits or not array.size or array.dtype.kind not in "fiu":
            found = f"a recording of shape {array.shape} and type {array.dtype}"
            raise UsageError(
                f"{found}: expected numbers in mV, ({L}, samples) or (N, {L}, samples)"
            )
        return array.astype(np.float64)

    @torch.no_grad()
    def mean_probability(self, ecg: np.ndarray, rate_hz: float) -> np.ndarray:
        """(L, T) -> (9,), the mean over the windows."""
        ecg, _ = fill_gaps(ecg, rate_hz)
        own_rate_hz = self.sample_rate_hz
        resampled = selfmis.resample(ecg, rate_hz, own_rate_hz)
        width, T = round(10 * own_rate_hz), resampled.shape[1]
        count = max(1, math.ceil(T / width - 0.01))
        windows = []
        for start in np.linspace(0, max(0, T - width), count).round().astype(int):
            # Flat as recorded: beside an ECG, the filter of the new rate leaves a little of it.
            first = round(start * rate_hz / own_rate_hz)
            last = round((start + width) * rate_hz / own_rate_hz)
            if np.ptp(ecg[:, first:last], axis=1).any():
                one = resampled[:, start : start + width]
                one = selfmis.preprocess(one, sample_rate_hz=own_rate_hz, **self.preprocessing)
                windows.append(one)
        if not windows:
            raise UsageError("the recording is flat")
        parts = torch.from_numpy(np.stack(windows)).split(32)  # 24 hours have 8,640 windows
        return torch.cat([self.classifier(part) for part in parts]).mean(0).numpy()


def load_detector(path) -> Detector:
    """The detector of a probe.pt, on the CPU."""
    return Detector(path)


# ----------------------------------------------------------------------------------------------
# From probabilities to an answer
# ----------------------------------------------------------------------------------------------


def operating_point(validation: dict, specificity: float = 0.9, prevalence=PREVALENCE) -> dict:
    """Where "any infarct" is positive, and what that costs on the validation fold.

    It is set by the normal records, because most people are normal: at most 1 - specificity of
    them are at or above the threshold. "no_verdict" says why there is none.
    """
    score = validation["any_infarct"].double().numpy()  # (N,)
    infarct, normal = validation["infarct"].numpy(), validation["normal"].numpy()
    groups = {"infarct": infarct, "normal": normal, "other": ~infarct & ~normal}
    counts = {name: int(group.sum()) for name, group in groups.items()}
    point = {"specificity": specificity, "prevalence": prevalence, "validation_records": counts}
    if min(counts["infarct"], counts["normal"]) < MINIMUM_CASES:
        there = f"{counts['infarct']} infarcts and {counts['normal']} normal records"
        reason = (
            f"the validation fold has {there}; rates of fewer than {MINIMUM_CASES} mean nothing"
        )
        return point | {"threshold": None, "no_verdict": reason}
    # Of the highest normal scores, the first that is one too many stays below, with all that tie
    # with it. Half way from it to the next score, so that rounding does not decide.
    allowed = math.floor((1 - specificity) * counts["normal"] + 1e-9)
    below = np.sort(score[normal])[::-1][allowed]
    above = score[score > below].min(initial=below + 1)
    threshold = float(below + above) / 2
    found = {
        name: float((score[group] >= threshold).mean())
        for name, group in groups.items()
        if group.any()
    }
    right, wrong = found["infarct"] * prevalence, found["normal"] * (1 - prevalence)
    return point | {
        "threshold": threshold,
        "sensitivity": found["infarct"],
        "false_alarms_normal": found["normal"],
        "false_alarms_other": found.get("other"),
        "predictive_value": right / (right + wrong) if right + wrong else None,
    }


def make_answer(probabilities: dict, content: dict, point: dict) -> dict:
    """One verdict, and the types from the most to the least probable, as JSON says them."""
    score = 1 - math.prod(1 - p for p in probabilities.values())
    positive = None
    if point["threshold"] is not None:
        positive = score >= point["threshold"]
    types = {}
    for t in sorted(probabilities, key=probabilities.get, reverse=True):
        positives = int(content["positives"][content["classes"].index(t)])
        times = probabilities[t] * len(content["validation"]["normal"]) / max(1, positives)
        types[t] = {
            "probability": probabilities[t],
            "times_its_share": times if positives else None,
            "validation_positives": positives,
        }
    return {"any_infarct": {"score": score, "positive": positive} | point, "types": types}


def verdict_lines(verdict: dict) -> list[str]:
    """The verdict and what it is worth, in words."""
    word = {True: "POSITIVE", False: "negative", None: "NO VERDICT"}[verdict["positive"]]
    return [f"any infarct: {word} (score {verdict['score']:.3f})", *point_lines(verdict)]


def point_lines(point: dict) -> list[str]:
    """An operating point in words, or why there is none."""
    if point["threshold"] is None:
        return [point["no_verdict"]]
    counts = point["validation_records"]
    found = f"{point['sensitivity']:.0%} of {counts['infarct']:,} infarcts"
    alarms = f"{point['false_alarms_normal']:.0%} of {counts['normal']:,} normal"
    if counts["other"]:
        alarms += f" and {point['false_alarms_other']:.0%} of {counts['other']:,} other abnormal"
    lines = [
        f"positive from {point['threshold']:.3f}: on the validation fold this finds {found}, "
        f"with false alarms in {alarms} records"
    ]
    if point["predictive_value"] is not None:
        where = f"{point['prevalence']:.1%} have an infarct and all others a normal ECG"
        lines.append(f"where {where}, {point['predictive_value']:.0%} of positives are right")
    return lines


def type_lines(types: dict) -> list[str]:
    """Each type's probability, and how many times its share of the validation fold that is."""
    lines = []
    for name, entry in types.items():
        line = f"{name:<6}{entry['probability']:7.4f}"
        if entry["times_its_share"] is not None:
            line += f"  {entry['times_its_share']:5.1f} x its share"
        if entry["validation_positives"] < MINIMUM_CASES:
            line += f" (of {entry['validation_positives']} cases only)"
        lines.append(line)
    return lines


def describe_data(entries: list[dict]) -> str:
    """The data that something was trained on and chosen by, in one line."""
    words = []
    for entry in entries:
        chosen = "chosen by " if entry.get("use") == "validation" else ""
        labels = "with labels" if entry["labels"] else "without labels"
        folds = " ".join(map(str, entry["folds"]))
        words.append(
            f"{chosen}{entry['data']}, {entry['records']:,} records {labels}, folds {folds}"
        )
    return "; ".join(words) or "nothing"


def describe_probe(content: dict) -> dict:
    """What a probe was trained on, how it did on its test fold, and what to be warned of."""
    entries = content["training_data"] + content["head_training_data"]
    trained = [entry for entry in entries if "use" not in entry]
    unique = [entry for i, entry in enumerate(trained) if entry not in trained[:i]]
    results, warnings = content["results"], list(content["warnings"])
    if all(entry["data"].startswith("synthetic") for entry in entries):
        warnings.append("trained on synthetic ECG alone: it knows no real heart")
    return {
        "trained_on": describe_data(unique),
        "test_auc": {
            "any infarct against normal": results["any"]["NORM"]["auc"],
            "mean of nine types": results["nine"]["mean"],
            "mean of six types": results["six"]["mean"],
        },
        "warnings": warnings,
    }


def probe_lines(probe: dict) -> list[str]:
    """`describe_probe` in words: one line, and the warnings."""
    aucs = [f"{name} {auc:.3f}" for name, auc in probe["test_auc"].items() if auc is not None]
    auc = ", ".join(aucs) or "not known"
    lines = [f"probe trained on: {probe['trained_on']}; test AUC: {auc}"]
    return lines + [f"warning: {warning}" for warning in probe["warnings"]]


def draw_page(path, ecg: np.ndarray, sample_rate_hz: float, title: str, answer: dict) -> None:
    """Up to 30 s of one lead (T,) in mV on ECG paper; below it the verdict and the types."""
    width = int(10 * sample_rate_hz)
    rows = min(3, math.ceil(len(ecg) / width))
    tall, below = 40 + 30 * rows, 92  # mm
    figure, axes = ecg_paper(260, tall, below)
    for row in range(rows):
        part = ecg[row * width : (row + 1) * width]
        mm = np.clip(10 * (part - np.median(ecg)), -14, 19)
        axes.plot(25 * np.arange(len(part)) / sample_rate_hz, mm - 30 * row, "k", linewidth=0.8)
    seconds = len(ecg) / sample_rate_hz
    shown = f"first {rows * 10} of {seconds:.0f} s, " if seconds > rows * 10 else ""
    caption = f"{title}   {shown}25 mm/s, 10 mm/mV   {DISCLAIMER}"
    axes.text(0, 23, caption, fontsize=8, parse_math=False)  # a $ in a name is no formula

    # Neither red for an alarm nor green for its absence; no verdict has a frame of its own.
    looks = {True: ("#fbe3c0", "solid"), False: ("#e8edf2", "solid"), None: ("white", "dotted")}
    colour, frame = looks[answer["any_infarct"]["positive"]]
    box = {"facecolor": colour, "edgecolor": "#444444", "linestyle": frame, "pad": 6}
    text = "\n".join(verdict_lines(answer["any_infarct"]))
    figure.text(0.02, (below - 4) / (tall + below), text, va="top", fontsize=10, bbox=box)
    p = [entry["probability"] for entry in answer["types"].values()]
    area = (0.3, 12 / (tall + below), 0.66, 54 / (tall + below))
    bars = figure.add_axes(area, xlim=(0, max(0.05, 1.05 * max(p))), xlabel="probability")
    bars.barh(range(len(p)), p, color="#8595a5")
    bars.set_yticks(range(len(p)), type_lines(answer["types"]), family="monospace", fontsize=8)
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)


# ----------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m extras.detect", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    kinds = "WFDB records, .csv, .tsv, .txt or .npy files, or folders of them"
    parser.add_argument("recordings", nargs="+", type=Path, help=kinds)
    parser.add_argument("--probe", required=True, help="probe.pt of train_probe.py")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add = parser.add_argument_group("what a file does not say, or says wrong").add_argument
    add("--sample-rate", type=float, metavar="HZ")
    add("--unit", choices=("V", "mV", "uV", "nV"), help="of text and .npy files; default: mV")
    add("--column", help="its name, or its number from 1 (of text; times are not counted)")
    add = parser.add_argument_group("the answer").add_argument
    add("--specificity", type=share, default=0.9, help="among normal records; default: 0.9")
    usual = f"of infarcts among those you ask about; default: {PREVALENCE}, as in US adults"
    add("--prevalence", type=share, default=PREVALENCE, help=usual)
    add("--json", action="store_true", help="print JSON instead of words")
    add("--picture", metavar="PAGE.png", help="draw the strip and the answer of one recording")
    run_command(run_detect, parser, argv)


def share(text: str) -> float:
    """A number between 0 and 1 on the command line."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a share between 0 and 1, such as 0.9")
    return float(text)


def run_command(action, parser: argparse.ArgumentParser, argv=None) -> None:
    """What a user can cause is one sentence and exit code 2; --debug shows the traceback."""
    arguments = parser.parse_args(argv)
    try:
        status = action(arguments)
    except UsageError as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


def run_detect(arguments: argparse.Namespace) -> int:
    """Answers each recording that can be read; 2 if one could not, else 0."""
    detector = load_detector(arguments.probe)
    content, probe = detector.content, describe_probe(detector.content)
    point = operating_point(content["validation"], arguments.specificity, arguments.prevalence)
    paths = find_recordings(arguments.recordings)
    if arguments.picture and len(paths) > 1:
        raise UsageError(f"--picture: draws one recording, {len(paths)} were given")
    if not arguments.json:
        print("\n".join(probe_lines(probe)))
    entries = []
    for path in paths:
        try:
            entries.append(answer_recording(detector, point, path, arguments))
        except UsageError as error:  # the others are answered all the same
            if arguments.debug:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            entries.append({"file": str(path), "error": str(error)})
    if arguments.json:
        content = {"probe": probe, "recordings": entries}
        print(json.dumps(selfmis.nan_to_none(content), indent=1))
    else:
        print(f"\n{DISCLAIMER}")
    return 2 * any("error" in entry for entry in entries)


def answer_recording(detector: Detector, point: dict, path: Path, arguments) -> dict:
    """Reads, answers, draws and prints one recording; returns its entry in the JSON."""
    flags = {"sample_rate_hz": arguments.sample_rate, "unit": arguments.unit}
    flags["column"] = arguments.column
    ecg, rate, warnings = read_recording(path, detector.leads, **flags)
    try:
        answer = make_answer(detector(ecg, rate), detector.content, point)
    except UsageError as error:
        raise RecordError(f"{path}: {error}") from error
    warnings += check_recording(ecg, rate, detector.leads)
    entry = {"file": str(path), "leads": detector.leads, "seconds": ecg.shape[1] / rate}
    entry |= {"sample_rate_hz": rate, "warnings": warnings} | answer
    if not arguments.json:
        seconds, lead = f"{entry['seconds']:.1f} s", " ".join(detector.leads)
        print(f"\n{path}: {seconds} at {rate:g} Hz, lead {lead}")
        lines = [f"warning: {warning}" for warning in warnings]
        lines += verdict_lines(answer["any_infarct"])
        lines += ["types by probability; its share is that in the validation fold:"]
        print("\n".join(lines + type_lines(answer["types"])))
    if arguments.picture:
        title = f"{path.stem}, lead {detector.leads[0]}"
        draw_page(arguments.picture, ecg[0], rate, title, answer)
        entry["picture"] = arguments.picture
        if not arguments.json:
            print(f"picture: {arguments.picture}")
    return entry


def find_recordings(paths: list[Path]) -> list[Path]:
    """Every recording once: the segments of a record are left out, their master is listed."""
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        kinds = (".hea", ".npy", *TEXT_FILES)
        files = [file for file in path.rglob("*") if file.suffix.lower() in kinds]
        segments = {name for file in files if file.suffix == ".hea" for name in segments_of(file)}
        inside = [file for file in sorted(files) if file.is_file() and file not in segments]
        if not inside:
            raise UsageError(f"{path}: a folder without recordings")
        found += inside
    return list(dict.fromkeys(found))


def segments_of(header: Path) -> list[Path]:
    """The headers that a header of several segments ("name/2 ...") puts together."""
    text = header.read_text(encoding="utf-8", errors="replace") if header.is_file() else ""
    lines = [line.split() for line in text.splitlines() if line.strip() and line[0] != "#"]
    if not lines or "/" not in lines[0][0]:
        return []
    return [header.with_name(f"{line[0]}.hea") for line in lines[1:]]


if __name__ == "__main__":
    main()
