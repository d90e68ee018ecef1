"""Where the synthetic ECG is like PTB-XL and where it is not (realism check of arXiv 2506.23259).

    python -m extras.realism PTBXL --picture realism.png

Prints medians and Kolmogorov-Smirnov distances of intervals and amplitudes, real beside synthetic,
for normal records and each infarct type, and the difference of their spectra; --picture draws
median beats and spectra.

Real are the records of fold 8, since the generator was fitted to folds 1-7, which may flatter it
(--fold 1 2 3 4 5 6 7).  Folds 9 and 10 are for tests only.  Each real record stands beside four
synthetic ones of its class, so that both sides have the same mix; four, because fewer would add
their own chance to the distances.  Real labels do nothing but choose the class.
"""

import argparse
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

import selfmis
from extras import command_parser, run_action
from extras.detect import MINIMUM_CASES
from extras.evidence import print_table
from extras.synthetic import INDEPENDENT_ROWS, check_range, save_picture, synthesize
from selfmis import LEADS, MI_TYPES, STATEMENTS, Records, UsageError, import_optional

CLASSES = ("NORM",) + MI_TYPES
FRONT = ("ALMI", "AMI", "ASMI", "LMI")  # the other infarcts are of the inferior or posterior wall
FOR_EACH = 4  # synthetic records for each real one
SEED = 2506

RECORD_HZ = 100  # of records100/, the copy that was complete where this was measured
BEAT_HZ = 500  # R is found to 2 ms
BEFORE, AFTER = 150, 250  # samples of a beat before and after R: 300 and 500 ms
SMALLEST_WAVE = 0.08  # mV over eight leads: less is no P or T whose limits can be seen

INTERVALS = ("RR", "SD of RR", "PR", "QRS", "QTc")
WAVES = ("R", "S", "Q", "T", "ST60")
BANDS_HZ = ((0.2, 0.6), (0.6, 3), (3, 10), (10, 20), (20, 35), (35, 50))
SHOWN = ("I", "II", "V2", "V5")


# --------------------------------------------------------------------------------------------------
# What is measured in a record
# --------------------------------------------------------------------------------------------------


class Measurements(NamedTuple):
    """Of N records."""

    intervals: np.ndarray  # (N, 5) ms, as INTERVALS; NaN where a wave is missing
    amplitudes: np.ndarray  # (N, 12, 5) mV, as WAVES
    beats: np.ndarray  # (N, 4, 400) mV in the leads SHOWN at 500 Hz
    power: np.ndarray  # (N, 12, 251) mV^2/Hz, 0 to 50 Hz


def find_r(ecg: np.ndarray) -> np.ndarray:
    """(12, T) mV at 500 Hz -> samples of the R peaks: the largest vector near each steep place.

    By slope, as the baseline and a tall T have little of it; `recordings.cut_beats` does the same
    for one lead at 100 Hz.  `evidence.find_median_beat` goes by size, which finds beats enough for
    a median, but not each one, as RR needs.
    """
    signal = import_optional("scipy.signal", "finding beats")
    eight = ecg[INDEPENDENT_ROWS]
    change = np.linalg.norm(eight[:, 8:] - eight[:, :-8], axis=0)  # in 16 ms
    steep = np.convolve(change, np.ones(30) / 30, "same")  # (T - 8,)
    highest = [part.max() for part in np.array_split(steep, 5)]  # one of five may be an artefact
    peaks, _ = signal.find_peaks(steep, height=0.4 * np.median(highest), distance=150)
    size = np.linalg.norm(eight - np.median(eight, axis=1, keepdims=True), axis=0)  # (T,)
    starts = np.maximum(0, peaks + 4 - 40)
    return np.unique([start + size[start : start + 80].argmax() for start in starts]).astype(int)


def median_beat(ecg: np.ndarray, r: np.ndarray) -> np.ndarray | None:
    """(12, T) mV at 500 Hz -> (12, 400), 0 in the PQ segment; None below three whole beats."""
    whole = r[(r >= BEFORE) & (r + AFTER <= ecg.shape[1])]
    if len(whole) < 3:
        return None
    beat = np.median([ecg[:, at - BEFORE : at + AFTER] for at in whole], axis=0)
    return beat - beat[:, between(-90, -66)].mean(1, keepdims=True)


def between(low: float, high: float) -> slice:
    """Samples of a beat from `low` to `high` ms after R, both included."""
    return slice(BEFORE + round(low / 2), BEFORE + round(high / 2) + 1)


def wave_amplitudes(beats: np.ndarray) -> np.ndarray:
    """(..., 400) mV -> (..., 5) mV: R, S and Q (both positive downwards), T with its sign, ST60.

    S is the deepest point of the QRS complex, a deeper Q included; Q is the deepest before the
    largest vector, where V1 to V3 are already on their way down to S.  ST60 is 60 ms after a QRS
    complex of usual width.
    """
    qrs = beats[..., between(-70, 80)]
    q = -beats[..., between(-70, -4)].min(-1)
    st60 = beats[..., between(90, 120)].mean(-1)
    late = beats[..., between(160, 400)]
    largest = np.abs(late).argmax(-1)[..., None]
    t = np.take_along_axis(late, largest, -1)[..., 0]
    return np.stack([qrs.max(-1), -qrs.min(-1), q, t, st60], axis=-1)


def intervals(r: np.ndarray, beat: np.ndarray) -> np.ndarray:
    """R peaks and median beat (12, 400) -> (5,) ms, as INTERVALS; NaN where a wave is missing.

    QRS lasts from R both ways until eight leads together are flat for 10 ms.  P begins and T ends
    where the steepest tangent to the size of the vector meets zero.  QTc is Fridericia's.
    """
    rr = np.diff(r) * 1000 / BEAT_HZ
    slope = np.abs(np.gradient(beat[INDEPENDENT_ROWS], axis=1)).sum(0)  # (400,) mV in 2 ms
    is_steep = slope > 0.08 * slope[between(-100, 100)].max()
    onset = BEFORE - steep_samples(is_steep[BEFORE::-1])
    end = BEFORE + steep_samples(is_steep[BEFORE:])
    size = np.linalg.norm(beat[INDEPENDENT_ROWS], axis=0)  # (400,) mV
    p = np.full_like(size, -np.inf)
    p[onset - 90 : onset - 10] = size[onset - 90 : onset - 10]
    p_onset = foot(size, p.argmax(), -1)
    t_peak = between(160, 400).start + size[between(160, 400)].argmax()
    qt = 2 * (foot(size, t_peak, 1) - onset)
    qtc = qt / (rr.mean() / 1000) ** (1 / 3)
    return np.array([rr.mean(), rr.std(), 2 * (onset - p_onset), 2 * (end - onset), qtc])


def steep_samples(is_steep: np.ndarray) -> int:
    """How many of these samples come before 10 flat ms, in 100 ms."""
    last = 0
    for k in np.flatnonzero(is_steep[:51]):
        if k - last > 5:
            break
        last = k
    return int(last)


def foot(size: np.ndarray, peak: int, direction: int) -> float:
    """Where the wave with this peak ends (1) or, looking back (-1), begins, in samples.

    NaN for a wave below SMALLEST_WAVE.
    """
    flank = size[peak::direction][:50]  # 100 ms from the peak outwards
    fall = -np.gradient(flank)
    steepest = fall.argmax()
    if size[peak] < SMALLEST_WAVE or fall[steepest] <= 0:
        return np.nan
    return peak + direction * (steepest + flank[steepest] / fall[steepest])


def measure(ecgs: Iterable[np.ndarray]) -> Measurements:
    """Records (12, T) mV at 100 Hz, without those in which no three beats are found."""
    signal = import_optional("scipy.signal", "spectra")
    found = Measurements([], [], [], [])
    for ecg in ecgs:
        ecg = selfmis.nan_to_zero(ecg)
        fine = selfmis.resample(ecg, RECORD_HZ, BEAT_HZ)
        r = find_r(fine)
        beat = median_beat(fine, r)
        if beat is None:
            continue
        found.intervals.append(intervals(r, beat))
        found.amplitudes.append(wave_amplitudes(beat))
        found.beats.append(beat[[LEADS.index(lead) for lead in SHOWN]].astype(np.float32))
        found.power.append(signal.welch(ecg, RECORD_HZ, nperseg=500)[1].astype(np.float32))
    return Measurements(*map(np.array, found))


# --------------------------------------------------------------------------------------------------
# Real beside synthetic
# --------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """One class, or all."""

    real: Measurements
    synthetic: Measurements

    def chance(self) -> float:
        """The KS distance that 5 in 100 pairs of samples of these sizes exceed by chance."""
        stats = import_optional("scipy.stats", "KS distances")
        n, m = len(self.real.intervals), len(self.synthetic.intervals)
        return stats.kstwobign.isf(0.05) * np.sqrt(1 / n + 1 / m)


def find_class(records: Records, name: str) -> np.ndarray:
    """Rows of the records with this class, without those that have an infarct elsewhere too.

    That is, on the other side of the heart, which a synthetic patient never has; neighbouring
    types often stand together, and such a record counts for each.
    """
    other = MI_TYPES
    if name in MI_TYPES:
        other = [kind for kind in MI_TYPES if (kind in FRONT) != (name in FRONT)]
    has = records.labels[:, STATEMENTS.index(name)] > 0
    elsewhere = records.labels[:, [STATEMENTS.index(kind) for kind in other]].any(1)
    return np.flatnonzero(has & ~elsewhere)


def measure_class(records: Records, rows: np.ndarray, name: str) -> Pair:
    """These real records beside FOR_EACH times as many synthetic ones of the class."""
    real = measure(records.read(i, LEADS, RECORD_HZ) for i in rows)
    # Other patients in each class, or "all" would hold the same hearts several times.
    first = CLASSES.index(name) * 10**6
    numbers = range(first, first + FOR_EACH * len(rows))
    settings = {"types": name, "sample_rate_hz": RECORD_HZ}
    return Pair(real, measure(synthesize(1, SEED, first=k, **settings)[0][0] for k in numbers))


def measure_classes(records: Records, rows: dict[str, np.ndarray]) -> dict[str, Pair]:
    """{class: Pair} of the classes in whose records beats are found."""
    pairs = {}
    for name, chosen in rows.items():
        pair = measure_class(records, chosen, name)
        if len(pair.real.intervals):
            pairs[name] = pair
    return pairs


def join(parts: list[Measurements]) -> Measurements:
    return Measurements(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def ks_distances(real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """(N, ...) and (M, ...) -> (...) Kolmogorov-Smirnov distances, NaN left out."""
    stats = import_optional("scipy.stats", "KS distances")
    test = stats.ks_2samp(real, synthetic, axis=0, nan_policy="omit", method="asymp")
    return test.statistic


def band_differences(pair: Pair) -> np.ndarray:
    """(12, 6) dB: median power of the synthetic records over that of the real ones, by band."""
    hz = np.linspace(0, RECORD_HZ / 2, pair.real.power.shape[-1])
    columns = []
    for low, high in BANDS_HZ:
        inside = (hz >= low) & (hz < high)
        real, synthetic = (np.median(side.power[..., inside].sum(-1), axis=0) for side in pair)
        columns.append(10 * np.log10(synthetic / real))
    return np.stack(columns, axis=1)


# --------------------------------------------------------------------------------------------------
# The tables and the picture
# --------------------------------------------------------------------------------------------------


def comparison(real: np.ndarray, synthetic: np.ndarray, digits: int) -> list[str]:
    """A cell for each column of (N, K) and (M, K): real / synthetic median (KS distance)."""
    medians = [np.nanmedian(side, axis=0).round(digits) + 0 for side in (real, synthetic)]  # no -0
    rows = zip(*medians, ks_distances(real, synthetic), strict=True)
    return [f"{a:.{digits}f} / {b:.{digits}f} ({ks:.2f})" for a, b, ks in rows]


def summary_line(name: str, pair: Pair) -> list:
    """KS distances of a class; of amplitudes the median over the leads, and the largest."""
    of_intervals = ks_distances(pair.real.intervals, pair.synthetic.intervals)  # (5,)
    of_waves = ks_distances(pair.real.amplitudes, pair.synthetic.amplitudes)  # (12, 5)
    lead, wave = np.unravel_index(of_waves.argmax(), of_waves.shape)
    cells = [f"{ks:.2f}" for ks in (pair.chance(), *of_intervals, *np.median(of_waves, axis=0))]
    worst = f"{WAVES[wave]} in {LEADS[lead]}, {of_waves.max():.2f}"
    return [name, len(pair.real.intervals), len(pair.synthetic.intervals), *cells, worst]


def print_tables(pairs: dict[str, Pair]) -> None:
    lines = [["class", "real", "synthetic", "chance", *INTERVALS, *WAVES, "farthest amplitude"]]
    lines += [summary_line(name, pair) for name, pair in pairs.items()]
    print_table("KS distance; of amplitudes the median over twelve leads", lines)

    lines = [["class", "real", *INTERVALS]]
    for name, (real, synthetic) in pairs.items():
        cells = comparison(real.intervals, synthetic.intervals, 0)
        lines.append([name, len(real.intervals), *cells])
    print_table("Intervals in ms: median real / synthetic (KS distance)", lines)

    lines = [["class", "real", *INTERVALS]]
    for name, pair in pairs.items():
        low, high = np.nanpercentile(pair.real.intervals, (5, 95), axis=0)
        made_low, made_high = np.nanpercentile(pair.synthetic.intervals, (5, 95), axis=0)
        ranges = zip(low, high, made_low, made_high, strict=True)
        cells = [f"{a:.0f} to {b:.0f} / {c:.0f} to {d:.0f}" for a, b, c, d in ranges]
        lines.append([name, len(pair.real.intervals), *cells])
    print_table("Intervals in ms: from 5 to 95 % of the records, real / synthetic", lines)

    for name, (real, synthetic) in pairs.items():
        lines = [["lead", "real", *WAVES]]
        for k, lead in enumerate(LEADS):
            cells = comparison(real.amplitudes[:, k], synthetic.amplitudes[:, k], 2)
            lines.append([lead, len(real.amplitudes), *cells])
        print_table(f"Amplitudes of {name} in mV: median real / synthetic (KS distance)", lines)

    lines = [["lead", "real", *(f"{low:g} to {high:g} Hz" for low, high in BANDS_HZ)]]
    for lead, row in zip(LEADS, band_differences(pairs["all"]), strict=True):
        lines.append([lead, len(pairs["all"].real.power), *(f"{value:+.1f}" for value in row)])
    print_table("Power of the synthetic records over that of the real ones in dB, all", lines)


def draw_picture(pairs: dict[str, Pair], path: str) -> None:
    """Beats by lead and class, and spectra: medians, with the middle half of the records."""
    matplotlib_figure = import_optional("matplotlib.figure", "drawing")
    classes = [name for name in pairs if name != "all"] or ["all"]
    width = max(7, 1.6 * len(classes))
    figure = matplotlib_figure.Figure((width, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    beats = above.subplots(len(SHOWN), len(classes), sharex=True, sharey="row", squeeze=False)
    ms = (np.arange(BEFORE + AFTER) - BEFORE) * 1000 / BEAT_HZ
    for column, name in enumerate(classes):
        beats[0, column].set_title(f"{name}, {len(pairs[name].real.beats)} real", fontsize=10)
        beats[-1, column].set(xlabel="ms after R", xticks=(-200, 0, 200, 400))
        for row in range(len(SHOWN)):
            draw_sides(beats[row, column], ms, *(side.beats[:, row] for side in pairs[name]))
    spectra = below.subplots(1, len(SHOWN), sharey=True)
    hz = np.linspace(0, RECORD_HZ / 2, pairs["all"].real.power.shape[-1])[1:-1]
    for k, lead in enumerate(SHOWN):
        beats[k, 0].set_ylabel(f"{lead}, mV")
        power = [side.power[:, LEADS.index(lead), 1:-1] for side in pairs["all"]]
        draw_sides(spectra[k], hz, *power)
        spectra[k].set(xscale="log", yscale="log", xlabel="Hz", ylim=(1e-7, 0.1))
        spectra[k].set_title(f"{lead}, all", fontsize=10)
    spectra[0].set_ylabel("mV$^2$/Hz")
    spectra[0].legend(fontsize=8, loc="lower left")
    save_picture(figure, path, pixels_per_mm=3)


def draw_sides(axes, x: np.ndarray, real: np.ndarray, synthetic: np.ndarray) -> None:
    """(N, T) and (M, T): medians, and shades from quartile to quartile."""
    for name, colour, values in (("real", "black", real), ("synthetic", "tab:red", synthetic)):
        low, middle, high = np.percentile(values, (25, 50, 75), axis=0)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, middle, color=colour, linewidth=1, label=name)
    axes.margins(x=0)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def run_realism(flags: argparse.Namespace) -> None:
    if flags.records is not None:
        check_range("--records", flags.records, 1, math.inf)
    records = selfmis.find_records(flags.data, sample_rate_hz=RECORD_HZ)
    records = records[np.isin(records.folds, flags.fold)]
    order = np.random.default_rng(SEED).permutation(len(records))
    records = records[order[: flags.records]]
    rows = {name: find_class(records, name) for name in CLASSES}
    pairs = measure_classes(records, rows)
    folds = ", ".join(map(str, flags.fold))
    if not pairs:
        raise UsageError(f"{flags.data}: no record of {', '.join(CLASSES)} in fold {folds}")
    real = join([pair.real for pair in pairs.values()])
    synthetic = join([pair.synthetic for pair in pairs.values()])
    few = [name for name, pair in pairs.items() if len(pair.real.intervals) < MINIMUM_CASES]
    shown = {"all": Pair(real, synthetic)}
    shown |= {name: pair for name, pair in pairs.items() if name not in few}

    beatless = sum(map(len, rows.values())) - len(real.intervals)
    print(f"{flags.data}, fold {folds}; left out for want of three beats: {beatless} records.")
    print(f"Beside each stand {FOR_EACH} synthetic records of its class, seed {SEED}.")
    for name, chosen in rows.items():
        both = (records.labels[:, STATEMENTS.index(name)] > 0).sum() - len(chosen)
        if both:
            why = "infarct" if name == "NORM" else "infarct on the other side"
            print(f"Records left out of {name}, for an {why} too: {both}.")
    print("chance: the distance that two samples of one law exceed in 5 of 100 cases;")
    print("a median over leads varies less, the farthest of 60 more.")
    if few:
        counts = ", ".join(f"{name} {len(pairs[name].real.intervals)}" for name in few)
        print(f"Classes of fewer than {MINIMUM_CASES} real records count in all only: {counts}.")
    print_tables(shown)
    if flags.picture is not None:
        draw_picture(shown, flags.picture)
        print(f"\nbeats and spectra: {flags.picture}")


def main(argv=None) -> None:
    parser = command_parser("extras.realism", __doc__)
    add = parser.add_argument
    add("data", metavar="PTBXL", help="its folder")
    add("--fold", type=int, nargs="+", choices=range(1, 9), default=[8], help="default: 8")
    add("--records", type=int, metavar="N", help="at most N of these folds, drawn at random")
    add("--picture", metavar="OUT.png", help="draw median beats and spectra")
    run_action(run_realism, parser.parse_args(argv))


if __name__ == "__main__":
    main()
