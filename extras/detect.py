"""A person's own recording -> a calibrated answer, in words, as JSON or as a page.

    python -m extras.detect RECORDING...
    python -m extras.detect RECORDING --picture PAGE.png
    python -m extras.detect FOLDER --probe PROBE.pt --json > answers.json

    detector = load_detector()  # or load_detector("probe.pt")
    ecg, rate_hz, warnings = read_recording("watch.csv", detector.leads)  # or your own, in mV
    warnings += check_recording(ecg, rate_hz, detector.leads)
    point = operating_point(detector.content)
    make_answer(detector(ecg, rate_hz), detector.content, point)["any_infarct"]["positive"]

The answer is one verdict, "any infarct", and then the nine types ranked, as a description: nine
verdicts side by side would call two in five healthy people positive for something.
"""

import argparse
import json
import math
import sys
import textwrap
from numbers import Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import selfmis
from extras import command_parser, run_action
from extras.recordings import TEXT_FILES, beats_a_minute, check_recording, fill_gaps, header_of
from extras.recordings import read_recording, without_wander
from extras.synthetic import ecg_paper, save_picture
from selfmis import LEADS, MI_TYPES, SECONDS, RecordError, UsageError, segment_names

# What train_probe.py writes into probe.pt beside the encoder.
PROBE_KEYS = {"head", "classes", "temperature", "positives", "validation"}
PROBE_KEYS |= {"head_training_data", "results", "warnings"}
MINIMUM_CASES = 10  # rates and shares of fewer cases mean nothing
PREVALENCE = 0.03  # 3.1 % of US adults have had an infarct (2023 guideline on coronary disease)
SHARE = "probability, and times its share of the validation fold"
NO_ECG = 1 / 30  # a window whose span is less than so much of the widest holds no ECG
WEIGHTS = Path(__file__).with_name("weights") / "lead_I_small.pt"  # extras/ship.py makes them
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
    multiple); their probabilities are averaged, windows without an ECG left out; what averaging
    does was not measured, since PTB-XL has 10 s of each record. 2.5 to 10 s are seen as they are
    (RESULTS.md, "Other devices": four do as well as ten), by networks other than ResNet1D padded
    as in `preprocess`. Raises UsageError: another shape or type, too short, flat throughout (among
    several: NaN).

    Attributes: leads, sample_rate_hz, preprocessing; content, the whole checkpoint.
    """

    def __init__(self, path):
        self.content = selfmis.read_checkpoint(path)
        if not PROBE_KEYS <= set(self.content):
            remedy = "give a probe.pt of train_probe.py (of an old version: probe again)"
            raise UsageError(f"{path}: no calibrated head in it; {remedy}")
        encoder = selfmis.load_encoder(path)
        self.leads = LEADS if encoder.lead == "all" else (encoder.lead,)
        self.sample_rate_hz, self.preprocessing = encoder.sample_rate_hz, encoder.preprocessing
        self.classifier = CalibratedClassifier(encoder, self.content).eval()

    def __call__(self, ecg, sample_rate_hz: float) -> dict:
        ecg = self.as_numbers(ecg)
        if not isinstance(sample_rate_hz, Real) or not 1 <= sample_rate_hz <= 100_000:
            raise UsageError(f"a sample rate of {sample_rate_hz} Hz: expected 1 to 100,000")
        batch = ecg.reshape((1,) * (3 - ecg.ndim) + ecg.shape)  # (N, L, T)
        windows = [self.windows(one, sample_rate_hz) for one in batch]
        each = self.probabilities(np.concatenate(windows))  # (windows of all, 9)
        means = np.full((len(batch), len(MI_TYPES)), np.nan)
        ends = np.cumsum([len(part) for part in windows])
        for i, part in enumerate(np.split(each, ends[:-1])):
            if len(part):
                means[i] = part.mean(0)
        if ecg.ndim == 3:
            return dict(zip(MI_TYPES, means.T, strict=True))
        if np.isnan(means).any():
            raise UsageError("the recording is flat")
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

    def windows(self, ecg: np.ndarray, rate_hz: float) -> np.ndarray:
        """(L, T) -> (W, L, up to 10 s), those that hold an ECG, made ready for the encoder."""
        ecg, _ = fill_gaps(ecg, rate_hz)
        own_rate_hz = self.sample_rate_hz
        resampled = selfmis.resample(ecg, rate_hz, own_rate_hz)
        width, T = round(SECONDS * own_rate_hz), resampled.shape[1]
        count = window_count(T / own_rate_hz)
        starts = np.linspace(0, max(0, T - width), count).round().astype(int)
        # Zeros behind a short recording would draw down the network's mean over time.
        takes_any_length = isinstance(self.classifier.encoder, selfmis.ResNet1D)
        seen = min(width, T) if takes_any_length else width
        ready = [np.empty((0, len(ecg), seen), np.float32)]
        for start in starts[holds_ecg(ecg, starts * rate_hz / own_rate_hz, SECONDS * rate_hz)]:
            one = resampled[:, start : start + width]
            one = selfmis.preprocess(one, sample_rate_hz=own_rate_hz, **self.preprocessing)
            ready.append(one[None, :, :seen])
        return np.concatenate(ready)

    @torch.no_grad()
    def probabilities(self, windows: np.ndarray) -> np.ndarray:
        """(W, L, up to 10 s) -> (W, 9)."""
        parts = [np.empty((0, len(MI_TYPES)))]
        for i in range(0, len(windows), 64):  # 24 hours have 8,640 windows
            parts.append(self.classifier(torch.from_numpy(windows[i : i + 64])).numpy())
        return np.concatenate(parts)


def holds_ecg(ecg: np.ndarray, starts: np.ndarray, width: float) -> np.ndarray:
    """(W,) bool: which windows of (L, T), `width` samples from each start on, are no empty ones.

    Looked at as recorded: beside an ECG, the filter of another rate leaves a little of it.  And by
    quantiles: one spike would hide the ECG of all other windows.
    """
    spans = []
    for start in starts:
        part = ecg[:, round(start) : round(start + width)]
        low, high = np.quantile(part, [0.005, 0.995], axis=1)  # (L,) each
        spans.append((high - low).max())
    return np.array(spans) > NO_ECG * max(spans)


def window_count(seconds: float) -> int:
    """Windows of 10 s that cover a recording; a tenth of a second more needs none of its own."""
    return max(1, math.ceil(seconds / SECONDS - 0.01))


def load_detector(path=WEIGHTS) -> Detector:
    """The detector of a probe.pt, by default the one that comes with this file, on the CPU."""
    return Detector(path)


# ----------------------------------------------------------------------------------------------
# From probabilities to an answer
# ----------------------------------------------------------------------------------------------


def infarct_probability(probabilities: dict):
    """How probable any infarct is, were the types independent; {type: p} -> of the shape of p."""
    return 1 - np.prod([1 - np.asarray(p) for p in probabilities.values()], axis=0)


def operating_point(content: dict, specificity: float = 0.9, prevalence=PREVALENCE) -> dict:
    """Where "any infarct" is positive, and what that costs on a probe's validation fold.

    It is set by the normal records, because most people are normal: at most 1 - specificity of
    them are at or above the threshold. "no_verdict" says why there is none.
    """
    validation = content["validation"]
    score = validation["any_infarct"].double().numpy()  # (N,)
    infarct, normal = validation["infarct"].numpy(), validation["normal"].numpy()
    groups = {"infarct": infarct, "normal": normal, "other": ~infarct & ~normal}
    counts = {name: int(group.sum()) for name, group in groups.items()}
    point = {"specificity": specificity, "prevalence": prevalence, "validation_records": counts}
    if min(counts["infarct"], counts["normal"]) < MINIMUM_CASES:
        there = f"{counts['infarct']} infarcts and {counts['normal']} normal records"
        reason = f"the validation fold has {there}; fewer than {MINIMUM_CASES} say nothing"
        return point | {"threshold": None, "no_verdict": reason}
    # Of the highest normal scores, the first that is one too many stays below, with all that tie
    # with it. Half way from it to the next score, so that rounding does not decide.
    allowed = math.floor((1 - specificity) * counts["normal"] + 1e-9)
    below = np.sort(score[normal])[::-1][allowed]
    above = score[score > below].min(initial=below + 1)
    threshold = float(below + above) / 2
    positive = score >= threshold
    rates = {name: positive[group].mean().item() for name, group in groups.items() if group.any()}
    return point | {
        "threshold": threshold,
        "sensitivity": rates["infarct"],
        "false_alarms_normal": rates["normal"],
        "false_alarms_other": rates.get("other"),  # None: the fold has no such record
        "predictive_value": predictive_value(rates["infarct"], rates["normal"], prevalence),
        "rates": where_rates_hold(content, rates["infarct"], specificity, prevalence),
    }


def predictive_value(found: float, alarms: float, prevalence: float) -> float | None:
    """The share of positive answers that are right; None where there is no positive answer."""
    right, wrong = found * prevalence, alarms * (1 - prevalence)
    return right / (right + wrong) if right + wrong else None


def where_rates_hold(content: dict, found: float, specificity: float, prevalence: float) -> str:
    """On which recorders the rates of an operating point were measured."""
    text = "measured on recorders like the validation fold's"
    if content["lead"] == "all":
        return text
    if "handheld" not in content:
        often = "where false alarms are several times as frequent"
        return f"{text}, not on a hand-held device, {often}"
    measured = content["handheld"]  # by extras/ship.py, at a specificity of 90 %
    recordings = f"{measured['recordings']:,} normal rhythms on a hand-held device"
    text += f"; at 90% specificity {measured['positive']:.0%} of {recordings} were positive"
    if specificity == 0.9:
        value = predictive_value(found, measured["positive"], prevalence)
        text += f", so that there {value:.0%} of positive answers would be right"
    return text


def make_answer(probabilities: dict, content: dict, point: dict) -> dict:
    """One verdict, and the types from the most to the least probable, as JSON says them."""
    score = float(infarct_probability(probabilities))
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
    numbers = f"score {verdict['score']:.3f}"
    if verdict["threshold"] is not None:
        numbers += f", positive from {verdict['threshold']:.3f}"
    return [f"any infarct: {word} ({numbers})", *point_lines(verdict)]


def point_lines(point: dict) -> list[str]:
    """What an operating point finds and costs, or why there is none."""
    if point["threshold"] is None:
        return [point["no_verdict"]]
    counts = point["validation_records"]
    alarms = f"{point['false_alarms_normal']:.0%} of its {counts['normal']:,} normal"
    if counts["other"]:
        others = f"{counts['other']:,} other abnormal"
        alarms += f" and {point['false_alarms_other']:.0%} of its {others}"
    lines = [
        f"finds {point['sensitivity']:.0%} of the validation fold's {counts['infarct']:,} infarcts",
        f"false alarms: {alarms} records",
    ]
    if point["predictive_value"] is not None:
        where = f"{point['prevalence']:.1%} have an infarct and all others a normal ECG"
        lines.append(
            f"where {where}, {point['predictive_value']:.0%} of positive answers are right"
        )
    return [*lines, point["rates"]]


def type_words(entry: dict) -> str:
    """A type's probability, and how many times its share of the validation fold that is."""
    words = f"{entry['probability']:.4f}"
    if entry["times_its_share"] is not None:
        words += f"  {entry['times_its_share']:5.1f} x its share"
    if entry["validation_positives"] < MINIMUM_CASES:
        words += f"  (cases there: only {entry['validation_positives']})"
    return words


def describe_data(entries: list[dict]) -> str:
    """The data that something was trained on and chosen by, in one line, each once.

    Of ECGFounder's own neither folds nor the number of records are known.
    """
    words = []
    for entry in entries:
        text = f"chosen by {entry['data']}" if entry.get("use") == "validation" else entry["data"]
        records = f", {entry['records']:,} records" if "records" in entry else ""
        text += f"{records} {'with' if entry['labels'] else 'without'} labels"
        if entry.get("folds"):
            text += f", folds {' '.join(map(str, entry['folds']))}"
        words.append(text)
    return "; ".join(dict.fromkeys(words)) or "nothing"


def describe_probe(content: dict) -> dict:
    """What a probe was trained on, how it did on its test fold, and what to be warned of."""
    entries = content["training_data"] + content["head_training_data"]
    trained = [entry for entry in entries if entry.get("use") != "validation"]
    results, warnings = content["results"], list(content["warnings"])
    if all(entry["data"].startswith("synthetic") for entry in entries):
        warnings.append("trained on synthetic ECG alone: it knows no real heart")
    return {
        "trained_on": describe_data(trained),
        "test_auc": {
            "any_infarct_against_normal": results["any"]["NORM"]["auc"],
            "mean_of_nine_types": results["nine"]["mean"],
            "mean_of_six_types": results["six"]["mean"],
        },
        "warnings": warnings,
    }


def probe_lines(probe: dict) -> list[str]:
    """`describe_probe` in words: one line, and the warnings."""
    known = {name: auc for name, auc in probe["test_auc"].items() if auc is not None}
    auc = ", ".join(f"{name.replace('_', ' ')} {auc:.3f}" for name, auc in known.items())
    lines = [f"{probe['file']} trained on: {probe['trained_on']}; test AUC: {auc or 'not known'}"]
    return lines + [f"warning: {warning}" for warning in probe["warnings"]]


def draw_page(path, ecg: np.ndarray, rate_hz: float, title: str, answer: dict, about: list) -> None:
    """Up to 30 s of one lead (T,) in mV on ECG paper; below it the verdict and the types.

    about: lines on the detector, and warnings, that stand below the verdict.
    """
    verdict, types = answer["any_infarct"], answer["types"]
    lines = []
    for line in [*verdict_lines(verdict), *about]:
        lines += textwrap.wrap(line, 110, break_on_hyphens=False)
    width = int(10 * rate_hz)
    rows = min(3, math.ceil(len(ecg) / width))
    tall, below = 25 + 30 * rows, 78 + 5 * len(lines)  # mm
    figure, axes = ecg_paper(260, tall, below)
    for row in range(rows):
        part = ecg[row * width : (row + 1) * width]
        mm = np.clip(10 * (part - np.median(ecg)), -14, 19)
        axes.plot(25 * np.arange(len(part)) / rate_hz, mm - 30 * row, "k", linewidth=0.8)
    seconds = len(ecg) / rate_hz
    shown = f"first {rows * 10} of {seconds:.0f} s, " if seconds > rows * 10 else ""
    caption = f"{title}   {shown}25 mm/s, 10 mm/mV   {DISCLAIMER}"
    axes.text(0, 23, caption, fontsize=8, parse_math=False)  # a $ in a name is no formula

    # Neither red for an alarm nor green for its absence; no verdict has a frame of its own.
    looks = {True: ("#fbe3c0", "solid"), False: ("#e8edf2", "solid"), None: ("white", "dotted")}
    colour, frame = looks[verdict["positive"]]
    box = {"facecolor": colour, "edgecolor": "#444444", "linestyle": frame, "pad": 6}
    style = {"va": "top", "fontsize": 10, "parse_math": False, "bbox": box}
    figure.text(0.03, (below - 3) / (tall + below), "\n".join(lines), **style)

    p = [each["probability"] for each in types.values()]
    area = (0.07, 14 / (tall + below), 0.48, 50 / (tall + below))
    # Half the scale at least: a bar across the page for 5 % would look like an alarm.
    bars = figure.add_axes(area, xlim=(0, max(0.5, *p)), xlabel="probability of each type")
    bars.barh(list(types), p, color="#8595a5")
    place = {"transform": bars.get_yaxis_transform(), "va": "center", "fontsize": 9}
    for row, text in enumerate([SHARE, *map(type_words, types.values())], -1):
        bars.text(1.04, row, text, family="monospace", **place)
    bars.invert_yaxis()
    bars.tick_params(axis="y", length=0)
    bars.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)


# ----------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------


def find_recordings(paths: list[Path]) -> list[Path]:
    """Every recording once: a header, its data file and the segments it names are one."""
    kinds = (".hea", ".npy", *TEXT_FILES)
    recordings, segments = {}, set()
    for path in paths:
        inside = []
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in kinds]
        for file in [file for file in inside if file.is_file()] or [path]:
            header = file if file.is_dir() else header_of(file)
            recordings.setdefault(header, file)
            if header.suffix == ".hea" and header.is_file():
                segments |= {header.parent / f"{name}.hea" for name in segment_names(header)}
    return [file for header, file in recordings.items() if header not in segments]


def answer_recording(detector: Detector, probe: dict, point: dict, path: Path, flags) -> dict:
    """What --json prints of one recording; it is drawn too where --picture asks for it."""
    if path.is_dir():
        raise UsageError(f"{path}: a folder without recordings")
    known = {"sample_rate_hz": flags.sample_rate, "unit": flags.unit, "column": flags.column}
    ecg, rate, warnings = read_recording(path, detector.leads, **known)
    try:
        probabilities = detector(ecg, rate)
    except UsageError as error:
        raise RecordError(f"{path}: {error}") from error
    seconds = ecg.shape[1] / rate
    entry = {"file": str(path), "leads": detector.leads, "seconds": seconds, "sample_rate_hz": rate}
    entry["beats_a_minute"] = beats_a_minute(without_wander(ecg[0], rate))
    entry["warnings"] = warnings + check_recording(ecg, rate, detector.leads)
    entry["warnings"] += length_warnings(seconds, len(detector.windows(ecg, rate)))
    entry |= make_answer(probabilities, detector.content, point)
    if flags.picture:
        title = f"{path.stem}, {describe_rhythm(entry)}"
        about = probe_lines(probe) + [f"warning: {warning}" for warning in entry["warnings"]]
        draw_page(flags.picture, ecg[0], rate, title, entry, about)
        entry["picture"] = flags.picture
    return entry


def length_warnings(seconds: float, windows: int) -> list[str]:
    """What the length of a recording has to do with the rates; windows: those that hold an ECG."""
    count = window_count(seconds)
    if count == 1 and seconds > SECONDS - 0.1:
        return []
    text = f"{seconds:.1f} s, and the rates were measured on {SECONDS:.0f} s"
    if count > 1:
        text += f": the answer is the mean of {windows} such windows"
    if windows < count:
        text += f", the other {count - windows} hold no ECG"
    return [text]


def describe_rhythm(entry: dict) -> str:
    """The leads, and the heart rate, which a person can compare with what the device shows."""
    rate = entry["beats_a_minute"]
    beats = "" if rate is None else f", {rate:.0f} beats a minute"
    return f"lead {' '.join(entry['leads'])}{beats}"


def answer_lines(entry: dict) -> list[str]:
    """An answer in words."""
    what = f"{entry['seconds']:.1f} s at {entry['sample_rate_hz']:g} Hz"
    lines = [f"{entry['file']}: {what}, {describe_rhythm(entry)}"]
    lines += [f"warning: {warning}" for warning in entry["warnings"]]
    lines += [*verdict_lines(entry["any_infarct"]), f"types: {SHARE}"]
    lines += [f"  {name:<6} {type_words(each)}" for name, each in entry["types"].items()]
    if "picture" in entry:
        lines.append(f"picture: {entry['picture']}")
    return lines


def run_detect(flags: argparse.Namespace) -> int:
    """Answers each recording that can be read; 2 if one could not, else 0."""
    detector = load_detector(flags.probe)
    probe = {"file": flags.probe.name} | describe_probe(detector.content)
    point = operating_point(detector.content, flags.specificity, flags.prevalence)
    paths = find_recordings(flags.recordings)
    if flags.picture and len(paths) > 1:
        raise UsageError(f"--picture: draws one recording, {len(paths)} were given")
    entries, status, answered = [], 0, 0
    for path in paths:
        try:
            entries.append(answer_recording(detector, probe, point, path, flags))
        except UsageError as error:  # the others are answered all the same
            if flags.debug:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            entries.append({"file": str(path), "error": str(error)})
            status = 2
        else:
            answered += 1
            if not flags.json and answered == 1:
                print("\n".join(probe_lines(probe)), end="\n\n")
            if not flags.json:
                print("\n".join(answer_lines(entries[-1])), end="\n\n", flush=True)
    if flags.json:
        content = {"probe": probe, "recordings": entries}
        print(json.dumps(selfmis.nan_to_none(content), indent=1))
    elif answered:
        print(DISCLAIMER)
    return status


def share(text: str) -> float:
    """A number between 0 and 1 on the command line."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a share between 0 and 1, such as 0.9")
    return float(text)


def main(argv=None) -> None:
    parser = command_parser("extras.detect", __doc__)
    kinds = "WFDB records, .csv, .tsv, .txt or .npy files, or folders of them"
    parser.add_argument("recordings", nargs="+", type=Path, help=kinds)
    own = "probe.pt of train_probe.py; default: the detector that comes with this file"
    parser.add_argument("--probe", type=Path, default=WEIGHTS, help=own)
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
    run_action(run_detect, parser.parse_args(argv))


if __name__ == "__main__":
    main()
