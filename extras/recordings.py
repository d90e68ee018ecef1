"""A person's recording -> millivolts: a WFDB record, a .npy array or a table in text.

What a file does not say is asked for and never guessed, but for the unit, which is mV then; the
docstrings of the three readers are their contracts. Each gives ((L, T) mV with NaN where a sample
is missing, {"header" or "time column": the rate it states in Hz}, warnings).
"""

import csv
import io
import re
from pathlib import Path

import numpy as np

import selfmis
from selfmis import LEADS, RecordError, UsageError

TEXT_FILES = (".csv", ".tsv", ".txt")
LONG_GAP_SECONDS = 0.1  # about a QRS complex: a straight line through less hides no beat
MOST_COLUMNS = 64

# ----------------------------------------------------------------------------------------------
# Any file
# ----------------------------------------------------------------------------------------------


def read_recording(path, leads, *, sample_rate_hz=None, unit=None, column=None):
    """((L, T) float64 in mV without NaN, sample rate in Hz, warnings) of a recording.

    leads: one name, or all twelve. The keyword arguments are the flags of extras.detect and go
    before what the file says. Raises UsageError that names the file and the flag that helps.
    """
    path, leads = Path(path), selfmis.lead_names(leads)
    if column is not None and len(leads) > 1:
        raise UsageError(f"--column {column}: this probe reads {len(leads)} leads, not one column")
    if unit is not None and unit.lower() not in selfmis.MILLIVOLTS:
        raise UsageError(f"--unit {unit}: expected V, mV, uV or nV")
    read = read_record
    if path.suffix.lower() == ".npy":
        read = read_npy
    elif path.suffix.lower() in TEXT_FILES:
        read = read_text
    ecg, rates_hz, warnings = read(path, leads, unit, column)
    if not np.isfinite(ecg).any() or np.abs(selfmis.nan_to_zero(ecg)).max() > 1e9:
        raise RecordError(f"{path}: no sample is a number, or one is too large for an ECG")
    rate, contradiction = choose_rate(path, {"--sample-rate": sample_rate_hz} | rates_hz)
    missing = ~np.isfinite(ecg)
    ecg, lost = fill_gaps(ecg, rate)
    warnings = warnings + contradiction
    named = LEAD.fullmatch(column or "")
    if named and named[1].upper() != leads[0].upper():
        warnings.append(f"column {column} is taken for lead {leads[0]}, which trained the detector")
    if lost.any() or missing.mean() > 0.05:
        gaps = f"{lost.sum():,} of them in gaps of {LONG_GAP_SECONDS} s or longer"
        filled = "these are taken as the lead's median, the others lie on a line"
        warnings.append(
            f"{missing.sum():,} of {missing.size:,} samples are missing, {gaps}: {filled}"
        )
    return ecg, rate, warnings


def choose_rate(path: Path, rates_hz: dict[str, float | None]) -> tuple[float, list[str]]:
    """The first rate that is stated, and a warning where another one contradicts it."""
    stated = {place: rate for place, rate in rates_hz.items() if rate is not None}
    if not stated:
        raise UsageError(f"{path}: its sample rate is not known; give --sample-rate")
    place, rate = next(iter(stated.items()))
    if not 20 <= rate <= 100_000:
        sentence = f"{rate:g} Hz by the {place} is no sample rate of an ECG"
        raise UsageError(f"{path}: {sentence}; give --sample-rate")
    if all(abs(other / rate - 1) < 0.01 for other in stated.values()):
        return rate, []
    each = ", ".join(f"{other:g} Hz by the {place}" for place, other in stated.items())
    return rate, [f"contradicting sample rates ({each}); {rate:g} Hz is used"]


def fill_gaps(ecg: np.ndarray, sample_rate_hz: float) -> tuple[np.ndarray, np.ndarray]:
    """((L, T) without NaN, (L, T) True in long gaps).

    Short gaps become a straight line, long ones the lead's median. Zeros would be spikes where
    a lead has an offset, and the z-score after it would shrink the ECG.
    """
    filled, lost = selfmis.nan_to_zero(ecg), np.zeros(ecg.shape, bool)
    for lead, known in enumerate(np.isfinite(ecg)):
        x = filled[lead, known]
        if not len(x):  # an electrode that was never on stays at 0
            continue
        filled[lead] = np.interp(np.arange(ecg.shape[1]), np.flatnonzero(known), x)
        edges = np.flatnonzero(np.diff(known, prepend=True, append=True))
        for start, stop in edges.reshape(-1, 2):
            if stop - start >= LONG_GAP_SECONDS * sample_rate_hz:
                filled[lead, start:stop], lost[lead, start:stop] = np.median(x), True
    return filled, lost


# ----------------------------------------------------------------------------------------------
# WFDB records and arrays
# ----------------------------------------------------------------------------------------------


def header_of(path: Path) -> Path:
    """The header of a WFDB record that is given by its name or its data file; else the path."""
    if path.suffix.lower() in (".npy", *TEXT_FILES):
        return path
    headers = [Path(f"{path}.hea"), path.with_suffix(".hea")]
    return next((header for header in headers if header.is_file()), path)


def read_record(path: Path, leads, unit: str | None, column: str | None):
    """A WFDB record by its name, its header, or the data file beside its header.

    --column names a signal. Units are those of the header.
    """
    header = header_of(path)
    if header == path and path.is_file() and path.suffix != ".hea":
        raise RecordError(f"{path}: neither a WFDB record nor .csv, .tsv, .txt or .npy; convert it")
    path = Path(str(header).removesuffix(".hea"))
    try:
        ecg, rate = selfmis.read_wfdb(path, leads if column is None else (column,))
    except RecordError as error:
        if ": no lead " not in str(error):
            raise
        remedy = "; this probe needs all twelve leads"
        if len(leads) == 1:
            remedy = "; give --column NAME" if column is None else ""
        raise RecordError(f"{error}{remedy}") from error
    warnings = check_header(path)
    if unit is not None:
        warnings.append("--unit is ignored: a WFDB record states its unit")
    return ecg, {"header": rate}, warnings


def check_header(record: Path) -> list[str]:
    """A warning where the checksums in a WFDB header are not those of its samples.

    A header that states another format, or belongs to another file, gives a smooth answer from
    garbage, and nothing else shows it.
    """
    wfdb = selfmis.import_optional("wfdb", "reading records")
    try:
        content = wfdb.rdrecord(str(record), physical=False, smooth_frames=False)
    except ValueError:  # wfdb cannot give the raw samples of big-endian formats
        return []
    stated = content.checksum  # None for a record of several segments
    if not stated or None in stated:
        return []
    found = content.calc_checksum(expanded=True)
    if all(a % 65536 == b % 65536 for a, b in zip(stated, found, strict=True)):
        return []
    remedy = "does the header state another format, or belong to another file?"
    return [f"the checksum in its header is not that of its samples: {remedy}"]


def read_npy(path: Path, leads, unit: str | None, column: str | None):
    """(T,), (L, T) or (T, L) with one lead, or with twelve in the order of LEADS; mV by default."""
    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # numpy raises many kinds for broken files
        raise RecordError(f"{path}: not a readable .npy array of numbers") from error
    rows = np.atleast_2d(array)
    if rows.ndim == 2 and len(rows) not in (1, len(LEADS)):
        rows = rows.T  # (L, T)
    if rows.ndim != 2 or len(rows) not in (1, len(LEADS)) or rows.dtype.kind not in "fiu":
        found = f"an array of shape {array.shape} and type {array.dtype}"
        raise RecordError(f"{path}: {found}: expected numbers of 1 or 12 leads, (leads, samples)")
    names = list(LEADS) if len(rows) == len(LEADS) else [""]
    chosen = choose_columns(str(path), names, leads, column)
    return rows[chosen].astype(np.float64) * selfmis.MILLIVOLTS[(unit or "mV").lower()], {}, []


# ----------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------

# An exact name of a lead: I, Lead I, ECG I, ECG Lead I. All others need --column.
LEAD = re.compile(rf"(?:ecg[ _]?)?(?:lead[ _]?)?({'|'.join(LEADS)})", re.I)
NAME_AND_UNIT = re.compile(r"(.*?)[\s_]*(?:[\[(](.*)[\])]|[\s_]([munµμ]?v))", re.I)
WORDS = {"volt": 1e3, "volts": 1e3, "millivolts": 1.0, "microvolts": 1e-3}
VOLTAGES = selfmis.MILLIVOLTS | WORDS
NUMBER = re.compile(r"[+-]?(?:\d+[.,]?\d*|[.,]\d+)(?:e[+-]?\d+)?", re.I)
# A point or a comma in it is that of a decimal number: "1.234" may as well be a thousand.
DECIMAL = r"[+-]?(?:(?:0\d*|\d{4,})[.,]\d*|\d*[.,](?:\d{0,2}|\d{4,}))(?:[eE][+-]?\d+)?"
# "512 Hz", "1 kHz", "(Hz): 512.5", but not the end of a band ("0.05-150 Hz") nor "1.000 Hz", which
# may be a thousand; "512.844" cannot be half a million.
RATE = r"(?<![\d~-])(?<!\d[.,])(\d+(?:[.,]\d\d?)?|(?!100)[1-9]\d\d[.,]\d{3})"
FREQUENCY = re.compile(rf"{RATE} ?(k?)(?:hz|hertz)\b|\bhz\W{{1,5}}{RATE}(?![\d.,])", re.I)
# A line of a header that states the limit of a filter, or the mains.
FILTER = re.compile(r"filt|pass|band|cut-?off|mains|\b[lh]p\b", re.I)
TIME = re.compile(r"time|zeit", re.I)
TIME_UNIT = re.compile(r"(?<![a-z])(min|[nuµμm]s)", re.I)  # else seconds
PER_SECOND = {"min": 1 / 60, "ms": 1e3, "us": 1e6, "µs": 1e6, "μs": 1e6, "ns": 1e9}


def read_text(path: Path, leads, unit: str | None, column: str | None):
    """A table with a line for each sample, or an export of a watch.

    A table has one line of names (below it may be one of units), or no names and one column; a
    watch's export has lines "key,value" and then one sample a line. Cells stand between tabs,
    semicolons, commas or blanks, and a comma is a decimal comma where it separates none.
    Column: the one with the lead's exact name; or the only one, if it has no name and the header
    states no other lead. Unit: that in its name, else that in the header, else mV. Rate: by a
    column of times, else the one frequency in the header.
    """
    pandas = selfmis.import_optional("pandas", "reading a table in text")
    lines = read_lines(path)
    separator, start, names, header = find_numbers(path, lines)
    body = io.StringIO("\n".join(lines[start:]))
    as_text = {"header": None, "dtype": str, "na_filter": False, "skip_blank_lines": False}
    try:
        table = pandas.read_csv(body, sep=separator, **as_text)
    except ValueError as error:
        line = re.search(r"(?:line|row) (\d+)", str(error))
        place = start + int(line[1] if line else 1)
        raise RecordError(f"{path}: line {place}: not as many cells as above it") from error
    if len(table) > 2 and set(map(str, table.iloc[0])) <= {str(len(table) - 1), ""}:
        table, start = table[1:], start + 1  # BIOPAC writes the number of samples above them
    numbers = [pandas.to_numeric(table[i].str.replace(",", "."), errors="coerce") for i in table]
    chosen = choose_columns(f"{path}: line {max(1, start)}", names, leads, column)
    decimals = any(table[i].str.fullmatch(DECIMAL, na=False).any() for i in table)
    ecg = []
    for i in chosen:
        refuse_words(f"{path}: line", start + 1, names[i] or "1", table[i], numbers[i], decimals)
        ecg.append(numbers[i] * to_millivolts(f"{path}: line {start}", unit, names[i], header))
    rate, warnings = time_rate(names, numbers)
    return np.array(ecg), {"time column": rate, "header": stated_rate(header)}, warnings


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without empty ones at its end."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if "\0" in text:
        raise RecordError(f"{path}: binary, so not a recording as text")
    text = text.replace("\u2212", "-")  # the minus sign of some locales
    lines = text.rstrip(" \t\r\n,;").splitlines()
    for place, line in enumerate(lines, 1):
        values = len(re.findall(r"\d(?:[,;\t ]|$)", line))
        if values > MOST_COLUMNS or len(line) > 10_000:
            sentence = f"line {place} holds {values:,} numbers in {len(line):,} characters"
            raise RecordError(f"{path}: {sentence}; one sample a line is expected")
    return lines


def find_numbers(path: Path, lines: list[str], separator: str = ""):
    """(separator, index of the first line of numbers, names of the columns, lines above them).

    Seen from the middle of the file, where numbers stand in any case. A name holds its unit; the
    only column without a name has the lead that the header states, or "".
    """
    middle = next((line for line in lines[len(lines) // 2 :] if re.search(r"\d", line)), "")
    separator = separator or find_separator(middle)
    pattern = split_line(middle, separator)
    rows = (i for i, line in enumerate(lines) if is_like(split_line(line, separator), pattern))
    start = next(rows, None)
    if start is None:
        raise RecordError(f"{path}: no column of numbers in it; one sample a line is expected")

    header = [line for line in lines[:start] if line.strip().lower() not in ("", "nan")]
    upper, lower = (split_line(line, separator) for line in ["", "", *header][-2:])
    count = len(pattern)
    if separator == "," and NUMBER.fullmatch(middle.strip()):  # "12,345": two numbers, or one?
        if not lines[start - 1].strip() or not are_names(lower, count):
            return find_numbers(path, lines, "\t")
    if are_names(upper, count) and len(lower) == count < 2 * sum(map(is_unit, lower)):
        names = [f"{name} ({unit})" for name, unit in zip(upper, lower, strict=True)]
        return separator, start, names, header[:-2]
    if are_names(lower, count):
        return separator, start, lower, header[:-1]
    if count > 1:
        sentence = f"line {start + 1}: {count} columns of numbers and no line of names"
        raise UsageError(f"{path}: {sentence}; write one above it, such as time,I")
    return separator, start, [stated_leads(header)], header


def find_separator(line: str) -> str:
    """What stands between the numbers of a line; a tab where it is one number."""
    cells = line.split()
    if len(cells) > 1 and all(map(NUMBER.fullmatch, cells)):
        return "\t" if "\t" in line else r"\s+"  # blanks; commas are decimal commas
    blank = r"\s+" if len(cells) > 1 else "\t"
    return next((mark for mark in "\t;," if mark in line), blank)


def split_line(line: str, separator: str) -> list[str]:
    """The cells of a line, without quotes and the mark of a comment."""
    line = line.lstrip("# ")
    if separator == r"\s+":
        cells = line.split()
    else:
        cells = next(csv.reader([line], delimiter=separator), [])
    return [cell.strip(" '\"") for cell in cells]


def is_like(cells: list[str], pattern: list[str]) -> bool:
    """Whether a line has as many cells as the pattern, and numbers or nothing where it has them."""
    if len(cells) != len(pattern):
        return False
    pairs = zip(cells, pattern, strict=True)
    shown = [cell for cell, other in pairs if NUMBER.fullmatch(other) and cell]
    return len(shown) > 0 and all(map(NUMBER.fullmatch, shown))


def are_names(cells: list[str], count: int) -> bool:
    """Whether cells are names of `count` columns.

    Not "key: value" or "key,value" of a header, which may stand above numbers in one column.
    """
    if len(cells) != count or not any(cells) or any(map(NUMBER.fullmatch, cells)):
        return False
    key, value = cells[0], cells[-1]
    stated = FREQUENCY.search(value) or is_unit(value) or value.startswith(f"{key} ")
    return count > 2 or not (stated or (count == 1 and re.search("[:=,;]", key)))


def is_unit(cell: str) -> bool:
    """Of a voltage or of time."""
    return cell.lower() in VOLTAGES or re.fullmatch("s|sec|seconds|[nuµμm]s", cell) is not None


def split_name(name: str) -> tuple[str, str]:
    """("ECG I", "uV") of "ECG I [uV]"; the unit may be missing."""
    match = NAME_AND_UNIT.fullmatch(name)
    return (match[1], match[2] or match[3]) if match else (name, "")


def header_pairs(header: list[str]) -> list[tuple[str, str]]:
    """(key, value) of lines "key,value", "key: value" and the like; a first key is empty."""
    pairs = []
    for line in header:
        cells = [cell.strip(" '\"#[]()") for cell in re.split("[,;:=\t]", line)]
        pairs += zip(["", *cells], cells, strict=False)
    return pairs


def stated_leads(header: list[str]) -> str:
    """The leads that a header states ("Lead,Lead I", "Ableitung,Ableitung I"), else ""."""
    matches = [LEAD.fullmatch(value.removeprefix(f"{key} ")) for key, value in header_pairs(header)]
    return ", ".join(sorted({match[1] for match in matches if match}))


def stated_rate(header: list[str]) -> float | None:
    """The one frequency of a header that can be a sample rate."""
    rates = set()
    text = "\n".join(line for line in header if not FILTER.search(line))
    for before, kilo, behind in FREQUENCY.findall(text):
        rate = float((before or behind).replace(",", ".")) * (1000 if kilo else 1)
        if rate >= 100 and rate != 150:  # 35, 40, 50, 60 and 150 Hz are those of filters and mains
            rates.add(rate)
    return rates.pop() if len(rates) == 1 else None


def choose_columns(place: str, names: list[str], leads, column: str | None) -> list[int]:
    """Indices of the columns of the leads, or of --column: a name, or a number from 1.

    Columns of times are not counted. place: file and line, for the sentence that asks.
    """
    signals = [i for i, name in enumerate(names) if not TIME.search(name)]
    bare = {i: split_name(names[i])[0] for i in signals}
    matches = {i: LEAD.fullmatch(name) for i, name in bare.items()}
    chosen = []
    for lead in leads:
        found = [i for i, match in matches.items() if match and match[1].upper() == lead.upper()]
        if column is not None:
            found = [i for i in signals if column in (names[i], bare[i])]
            if not found and column.isdecimal():
                found = signals[int(column) - 1 : int(column)] if int(column) else []
        elif names == [""] and len(leads) == 1:
            found = signals
        chosen += found if len(found) == 1 else []
    if len(chosen) == len(leads):
        return chosen
    wanted = f"lead {', '.join(leads)}" if column is None else f"--column {column}"
    there = ", ".join(f"{n} {names[i] or '(no name)'}" for n, i in enumerate(signals, 1))
    remedy = "give --column NAME or its number" if len(leads) == 1 else "name them I, II, ..."
    raise UsageError(f"{place}: no column for {wanted} among {len(signals)} ({there}); {remedy}")


def refuse_words(file: str, first: int, name: str, cells, numbers, decimals: bool) -> None:
    """UsageError where a column of text is not one of numbers; single words are missing samples.

    Neither is a cell with a digit ("1,234.5": the peaks of an ECG would be lost, and bridged), nor
    are numbers that may as well be grouped thousands, where no number of the file is a decimal.
    """
    wrong, sentence = numbers.isna(), "is not a number"
    if wrong.mean() < 0.3:  # every second line empty: then the rate is wrong too
        wrong &= cells.str.contains(r"\d", na=False)
    if not wrong.any() and not decimals:
        wrong = cells.str.contains("[.,]", na=False)
        sentence = "may be a decimal or a thousand; write it with another number of decimals"
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        cell = cells.iloc[row]
        raise UsageError(f"{file} {first + row}, column {name}: '{cell}' {sentence}")


def to_millivolts(place: str, unit: str | None, name: str, header: list[str]) -> float:
    """Millivolts a unit of a column: by --unit, its name, the header, else 1."""
    unit = unit or split_name(name)[1]
    if not unit:
        units = {
            value
            for key, value in header_pairs(header)
            if value.lower() in VOLTAGES or re.match("unit|einheit", key, re.I)
        }
        if len({VOLTAGES.get(value.lower()) for value in units}) > 1:
            each = ", ".join(sorted(units))
            raise UsageError(f"{place}: the header states the units {each}; give --unit")
        unit = next(iter(units), "mV")
    if unit.lower() not in VOLTAGES:
        raise UsageError(f"{place}: {unit} is not a voltage; give --unit or another --column")
    return VOLTAGES[unit.lower()]


def time_rate(names: list[str], numbers) -> tuple[float | None, list[str]]:
    """(the rate by the last column of times that has one, a warning where steps are uneven)."""
    rate, warnings = None, []
    for name, times in zip(names, numbers, strict=True):
        if not TIME.search(name) or times.count() < max(2, len(times) / 2):
            continue
        steps = np.diff(times.dropna())
        typical = np.median(steps)
        even = np.abs(steps - typical) < 0.75 * typical  # rounded ones too: 7 or 8 ms
        if not even.all():
            uneven = f"{(~even).sum():,} of {len(steps):,} steps"
            warnings.append(f"the times do not grow evenly ({uneven}): samples may be lost")
        unit = TIME_UNIT.search(name)
        factor = PER_SECOND[unit[1].lower()] if unit else 1
        stated = factor / steps[even].mean() if even.any() else 0
        if 20 <= stated <= 100_000:  # else a counter, or milliseconds without their unit
            rate = float(stated)
    return rate, warnings


# ----------------------------------------------------------------------------------------------
# What looks wrong with a recording
# ----------------------------------------------------------------------------------------------


def check_recording(ecg: np.ndarray, sample_rate_hz: float, leads) -> list[str]:
    """What looks wrong with (L, T) in mV, a sentence each.

    Limits are from PTB-XL, folds 1-8, but for that of `beats_differ`, which is not fitted.
    """
    warnings = []
    for lead, x in zip(leads, ecg, strict=True):
        sentences = check_amplitude(x, sample_rate_hz)
        span = np.ptp(np.quantile(x, [0.005, 0.995]))
        noise = noise_level(x, sample_rate_hz)
        if span > 0 and noise > 0.08 * span:
            sentences.append(f"is noisy: {1000 * noise:.0f} uV of noise in {span:.2f} mV")
        if lead == "I" and len(x) > sample_rate_hz:
            level = without_wander(x, sample_rate_hz)
            if not sentences:  # what is wrong already makes beats differ, and hides some
                sentences = check_beats(level)
            if points_down(level):  # other leads do in healthy people
                remedy = "the arm electrodes may be swapped, or a watch worn on the other wrist"
                sentences.append(f"points down: {remedy}")
        warnings += [f"lead {lead} {sentence}" for sentence in sentences]
    return warnings


def check_beats(x: np.ndarray) -> list[str]:
    """Noise, or a wrong sample rate; x: (T,) at 100 Hz, without wander."""
    if beats_differ(x):
        reason = "they differ more than they are large"
        return [f"is noisy or has beats of two kinds: {reason}; record it again"]
    rate = beats_a_minute(x)
    if rate is not None and not 40 <= rate <= 130:
        question = "is the sample rate right? compare with what the device shows"
        return [f"has {rate:.0f} beats a minute: {question}"]
    return []


def check_amplitude(x: np.ndarray, sample_rate_hz: float) -> list[str]:
    """A dead electrode, a saturated amplifier, a wrong unit, a spike; x: (T,) in mV."""
    sentences = []
    changes = np.flatnonzero(np.diff(x, prepend=np.nan, append=np.nan))
    still = np.diff(changes).max() / sample_rate_hz
    if still >= 1:
        sentences.append(f"does not change for {still:.1f} s: an electrode may be off")
    elif (x == x.max()).mean() + (x == x.min()).mean() > 0.02:
        limits = f"{x.min():.2f} or {x.max():.2f} mV"
        sentences.append(f"is cut off at {limits}: the amplifier was saturated")
    span = np.ptp(np.quantile(x, [0.005, 0.995]))
    if span > 10:
        sentences.append(f"spans {span:.3g} mV: are these microvolts? give --unit uV")
    elif 0 < span < 0.05:
        sentences.append(f"spans {span:.3g} mV: is the unit right? give --unit")
    peak = np.abs(x - np.median(x)).max()
    if peak > 5 * span > 0:
        remedy = "is that a mark or a missing sample? remove it"
        sentences.append(f"has a spike of {peak:.3g} mV: {remedy}")
    return sentences


def smooth(x: np.ndarray, width: int) -> np.ndarray:
    """The running mean over `width` samples."""
    return np.convolve(x, np.ones(width) / width, "same")


def noise_level(x: np.ndarray, sample_rate_hz: float) -> float:
    """The deviation in mV of what is faster than 25 ms. QRS complexes are, but they are short."""
    fast = x - smooth(x, 2 * round(0.025 * sample_rate_hz) + 1)
    return 1.48 * float(np.median(np.abs(fast)))


def skewness(x: np.ndarray) -> float:
    return float((x**3).mean() / max(1e-12, (x**2).mean()) ** 1.5)


def without_wander(x: np.ndarray, sample_rate_hz: float) -> np.ndarray:
    """At 100 Hz, with 0 at the median of the 0.6 s around."""
    signal = selfmis.import_optional("scipy.signal", "checking a recording")
    x = selfmis.resample(x[None], sample_rate_hz, 100)[0]
    return x - signal.medfilt(x, 61)


def find_r(x: np.ndarray) -> list[int]:
    """(T,) at 100 Hz -> where the R waves are, by the slope."""
    signal = selfmis.import_optional("scipy.signal", "checking a recording")
    slope = smooth(np.gradient(x) ** 2, 11)
    parts = np.array_split(slope, max(1, len(x) // 200))  # of two seconds or more: each has a beat
    highest = np.median([part.max() for part in parts])  # one of five may be an artefact
    peaks, _ = signal.find_peaks(slope, height=highest / 4, distance=25)  # half as steep
    starts = np.maximum(0, peaks - 8)
    return [int(start + np.abs(x[start : start + 16]).argmax()) for start in starts]


def beats_a_minute(x: np.ndarray) -> float | None:
    """By the median step from R to R; None below three beats; x: (T,) at 100 Hz."""
    r = find_r(x)
    return None if len(r) < 3 else 6000 / float(np.median(np.diff(r)))


def cut_beats(x: np.ndarray) -> np.ndarray:
    """(T,) at 100 Hz -> (N, 70), from 250 ms before each R to 450 ms after it, 0 in the mean."""
    beats = [x[i - 25 : i + 45] for i in find_r(x) if 25 <= i <= len(x) - 45]
    beats = np.reshape(beats, (-1, 70))
    return beats - beats.mean(1, keepdims=True)


def beats_differ(x: np.ndarray) -> bool:
    """Whether half of the beats differ from the median beat by more than its own deviation.

    x: (T,) at 100 Hz.  A rhythm that is only irregular has beats that are alike; where every second
    beat is an extra one they are not.  False below three beats.
    """
    beats = cut_beats(x)  # (N, 70)
    if len(beats) < 3:
        return False
    median_beat = np.median(beats, axis=0)
    return bool(np.median((beats - median_beat).std(1)) > median_beat.std())


def points_down(x: np.ndarray) -> bool:
    """By the skewness of the QRS complex and of the slower waves, P and T; x: (T,) at 100 Hz."""
    slow = smooth(x, 9)
    return skewness(x - slow) + skewness(slow) / 2 < 0
