"""SelfMIS: teach a single-lead ECG encoder to see what twelve leads see (arXiv 2509.19397).

A frozen 12-lead encoder f_m embeds a whole record, a single-lead encoder f_s embeds lead I cut out of the same record,
and a sigmoid loss pulls the two embeddings of one record together and pushes all other pairs apart.  A linear head on
the frozen f_s then detects nine types of myocardial infarction from lead I.

    paper           what                                                        here
    2.2, Eq. (1)    pair (S_i, M_i), S = lead I of M, nothing else changed      self_cut, SelfCuttingDataset
    2.3, Eq. (2)    z_s = f_s(S), z_m = stopgrad(f_m(M)): time means, (B, D)    ResNet1D, SelfMIS.forward, embed
    2.4, Eq. (3)    -1/B sum_ij log sigmoid(z_ij (t <S_i, M_j> - b))            siglip_loss
    3.2, Table 8    linear head on frozen z_s                                   train_probe.py
    Tables 1-3, 5   macro AUC over nine types; R@1, R@5, R@10                   macro_auc, retrieval
    Table 7         pre-training recipe                                         train_pretrain.py

Letters in shapes: B records of a batch, N records in all, L leads, T samples, C channels, D embedding, K classes.
Needs torch and numpy; wfdb only when a record file is read, and of what comes with it scipy to resample and filter, pandas to
read tables in text, matplotlib to draw.  Everything above the banner "Plumbing" can be copied alone.
"""

import ast
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

# The nine infarct types of the paper: PTB-XL's MI statements without the five 'subendocardial injury' ones (INJ..).
MI_TYPES = ("ALMI", "AMI", "ASMI", "ILMI", "IMI", "IPLMI", "IPMI", "LMI", "PMI")
# Those with at least 20 positives in PTB-XL's test fold: the mean over these six is the number to trust.
SIX_TYPES = ("ALMI", "AMI", "ASMI", "ILMI", "IMI", "LMI")

# The 44 diagnostic statements of PTB-XL (scp_statements.csv, diagnostic == 1), sorted: the columns of every label array.
STATEMENTS = tuple(
    "1AVB 2AVB 3AVB ALMI AMI ANEUR ASMI CLBBB CRBBB DIG EL ILBBB ILMI IMI INJAL INJAS INJIL INJIN INJLA IPLMI IPMI IRBBB "
    "ISCAL ISCAN ISCAS ISCIL ISCIN ISCLA ISC_ IVCD LAFB LAO/LAE LMI LNGQT LPFB LVH NDT NORM NST_ PMI RAO/RAE RVH SEHYP WPW".split()
)

# ----------------------------------------------------------------------------------------------------------------------
# Encoder: ECGFounder's Net1D without the BatchNorm modules it never calls and without its 150-class head
# ----------------------------------------------------------------------------------------------------------------------

SIZES = {
    "ecgfounder": dict(stem=64, widths=(64, 160, 160, 400, 400, 1024, 1024), depths=(2, 2, 2, 3, 3, 4, 4)),
    "small": dict(stem=32, widths=(32, 80, 80, 208, 208, 512, 512), depths=(1, 1, 1, 2, 2, 2, 2)),
}


class SameConv1d(nn.Module):
    """Convolution with ceil(T / stride) outputs; an odd number of padding zeros puts the extra one on the right.

    Signals are (B, C, 1, T) in here: only four-dimensional tensors can have the layout that the fast kernels want.
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel_size, stride, groups=groups)  # a level of its own, as in ECGFounder's keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, T = self.conv, x.shape[-1]
        (kernel,), (stride,) = conv.kernel_size, conv.stride
        padding = max(0, (math.ceil(T / stride) - 1) * stride + kernel - T)
        both = padding // 2
        if padding % 2:
            x, both = F.pad(x, (both, both + 1)), 0
        # By way of two dimensions, so that the gradient comes back in the weight's own layout, as DistributedDataParallel wants it.
        weight = conv.weight.flatten(1).unflatten(1, (-1, 1, kernel))
        return F.conv2d(x, weight, conv.bias, (1, stride), (0, both), groups=conv.groups)


class Block(nn.Module):
    """Pre-activation bottleneck: 1x1, grouped k x 1, 1x1, squeeze-excitation, plus a shortcut without weights."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int, group_width: int, first: bool):
        super().__init__()
        self.stride, self.first = stride, first
        self.grow = ((c_out - c_in) // 2, c_out - c_in - (c_out - c_in) // 2)  # zero channels before and behind
        self.conv1 = SameConv1d(c_in, c_out, 1)
        self.conv2 = SameConv1d(c_out, c_out, kernel_size, stride, groups=c_out // group_width)
        self.conv3 = SameConv1d(c_out, c_out, 1)
        self.se_fc1 = nn.Linear(c_out, c_out // 2)
        self.se_fc2 = nn.Linear(c_out // 2, c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.first else F.silu(x)  # (B, C_in, 1, T)
        h = self.conv2(F.silu(self.conv1(h)))  # (B, C, 1, T / stride)
        h = self.conv3(F.silu(h))
        gate = torch.sigmoid(self.se_fc2(F.silu(self.se_fc1(h.mean((2, 3))))))  # (B, C)
        if self.stride > 1:
            x = F.max_pool2d(F.pad(x, (0, 1)), (1, self.stride))  # pads with 0, not -inf: it shows at odd lengths
        if any(self.grow):
            x = F.pad(x, (0, 0, 0, 0, *self.grow))
        return h * gate[:, :, None, None] + x


class ResNet1D(nn.Module):
    """ECGFounder's network up to its embedding, the mean over time: (B, leads, T) float -> (B, D) float.

    The default has 30,587,632 parameters for one lead, 30,598,896 for twelve, and D = 1024.  Any T of at least 16 works.
    Keys of the state_dict are ECGFounder's own, so weights go both ways.  There is no normalisation layer and no dropout:
    train() and eval() compute the same, and several processes compute what one does.

    Attributes: leads, embedding_dim, architecture (the arguments that rebuild it).
    """

    def __init__(
        self,
        leads: int = 12,
        *,
        stem: int = 64,
        widths: Sequence[int] = (64, 160, 160, 400, 400, 1024, 1024),
        depths: Sequence[int] = (2, 2, 2, 3, 3, 4, 4),
        kernel_size: int = 16,
        group_width: int = 16,
    ):
        super().__init__()
        if len(widths) != len(depths) or any(w % group_width for w in widths):
            raise ValueError(f"widths {tuple(widths)} and depths {tuple(depths)}: need one depth a width, and multiples of {group_width}")
        self.architecture = dict(
            leads=leads, stem=stem, widths=list(widths), depths=list(depths), kernel_size=kernel_size, group_width=group_width
        )
        self.leads, self.embedding_dim = leads, widths[-1]
        self.seen: list[dict] = []  # data it was trained on and chosen by
        self.first_conv = SameConv1d(leads, stem, kernel_size, stride=2)
        self.stage_list = nn.ModuleList()
        c_in = stem
        for s, (width, depth) in enumerate(zip(widths, depths)):
            blocks = nn.ModuleList()
            for b in range(depth):
                blocks.append(Block(c_in, width, kernel_size, 1 if b else 2, group_width, first=s == b == 0))
                c_in = width
            self.stage_list.append(nn.ModuleDict({"block_list": blocks}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 3 or x.shape[1] != self.leads or x.shape[2] < 16:
            raise ValueError(f"an input of shape {tuple(x.shape)} does not fit: give (records, {self.leads} leads, at least 16 samples)")
        x = self.first_conv(x.unsqueeze(2))  # (B, C, 1, T / 2)
        if x.device.type != "mps":  # the layout of the fast kernels: grouped convolutions gain most, 2 x on a GPU, the whole step 1.1 x on a CPU
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.silu(x)
        for stage in self.stage_list:
            for block in stage["block_list"]:
                x = block(x)
        return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))  # (B, D), in float32 under autocast too


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a .pt or .pth file on the CPU; torch.load with weights_only=True, so a file cannot run code.

    ECGFounder's files hold a NumPy scalar, which torch refuses unless it is named; NumPy 1.x wrote it under another name.
    Raises ValueError with the path if there is no such file or it cannot be read.
    """
    core = np._core if hasattr(np, "_core") else np.core
    scalar = core.multiarray.scalar
    allowed = [(scalar, "numpy.core.multiarray.scalar"), scalar, np.dtype, type(np.dtype("float64"))]
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for broken files; all mean the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable checkpoint, or cut off while it was copied ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def load_ecgfounder(path: str | os.PathLike, leads: int) -> ResNet1D:
    """The encoder of `1_lead_ECGFounder.pth` or `12_lead_ECGFounder.pth` (or of a plain state_dict), in eval mode.

    Every key is used, except the BatchNorm modules that ECGFounder builds but never calls (first_bn, bn1, bn2, bn3) and
    its 150-class head (dense).  ValueError names every key that is missing, unknown or of another shape.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    unused = re.compile(r"(first_bn|dense|stage_list\.\d+\.block_list\.\d+\.bn[123])\.\w+")
    state = {key: value for key, value in state.items() if not unused.fullmatch(str(key))}
    encoder = ResNet1D(leads)
    load_strictly(encoder, state, path)
    return encoder.eval()


def load_strictly(module: nn.Module, state: dict, path: str | os.PathLike) -> None:
    """module.load_state_dict, with one ValueError that names all that does not fit."""
    want = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    have = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
    wrong = [f"{key} is missing" for key in want if key not in have]
    wrong += [f"{key} is unknown" for key in have if key not in want]
    wrong += [f"{key} is {have[key]}, not {want[key]}" for key in want if key in have and have[key] != want[key]]
    if wrong:
        raise ValueError(f"{path}: weights of another network: {'; '.join(wrong)}")
    module.load_state_dict(state)


def load_encoder(path: str | os.PathLike) -> ResNet1D:
    """The encoder of any checkpoint that train_pretrain.py or train_probe.py wrote, in eval mode.

    Its attributes say how to feed it: lead ("I", ... or "all"), sample_rate_hz, preprocessing (keyword arguments of
    `preprocess`), and seen (the data it was trained on and chosen by, its teacher's included).  A twelve-lead encoder that
    was probed on one lead (leads 12, lead "I") wants that lead in its own row and zeros in the others.
    """
    return stored_encoder(read_checkpoint(path), path)


def stored_encoder(content: dict, path: str | os.PathLike) -> ResNet1D:
    """load_encoder of a checkpoint that is read already; path is for its errors."""
    if "encoder" not in content or "architecture" not in content:
        known = "an ECGFounder file: use load_ecgfounder" if "state_dict" in content else "not a checkpoint of selfmis"
        raise ValueError(f"{path}: no encoder of selfmis in it; this is {known}")
    encoder = ResNet1D(**content["architecture"])
    load_strictly(encoder, content["encoder"], path)
    for name in ("lead", "sample_rate_hz", "preprocessing", "seen"):
        setattr(encoder, name, content[name])
    return encoder.eval()


def with_empty_leads(signals: torch.Tensor, encoder: ResNet1D, lead: str) -> torch.Tensor:
    """(B, 1, T) of one lead as a 12-lead encoder takes it, zeros in the other eleven; all else unchanged."""
    if signals.shape[1] == encoder.leads:
        return signals
    before = lead_index(lead)
    return F.pad(signals, (0, 0, before, encoder.leads - 1 - before))


# ----------------------------------------------------------------------------------------------------------------------
# Signals: from a record on disk to what an encoder sees
# ----------------------------------------------------------------------------------------------------------------------


def need(module: str, what: str):
    """A module that is imported only where it is used; ImportError that says what for, and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{what} needs the package {package}: pip install {package}") from error


MILLIVOLTS = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}  # micro sign and Greek mu both occur
MINIMUM_SECONDS = 2.5  # below this a record is refused: not enough beats to read


def read_ecg(record: str | os.PathLike, leads: str | Sequence[str] = LEADS, sample_rate_hz: float = 500) -> np.ndarray:
    """Leads of a WFDB record, by name: (len(leads), T) float32 in mV at sample_rate_hz.

    record: path with or without .hea.  Names are matched whatever their case or order (PTB-XL writes AVR, MIMIC-IV-ECG
    stores aVF before aVL); V, mV, uV and nV become mV; NaN and infinite samples become 0; another rate is resampled.
    The length is kept (`preprocess` sets it) and a flat lead is returned as it is (`SelfCuttingDataset` refuses it).
    Raises ValueError naming the record: missing or unreadable file, missing lead, unknown unit, no samples.
    """
    ecg, rate = read_wfdb(record, leads)
    return resample(fill(ecg), rate, sample_rate_hz).astype(np.float32)


def read_wfdb(record: str | os.PathLike, leads: str | Sequence[str]) -> tuple[np.ndarray, float]:
    """read_ecg at the record's own rate: (len(leads), T) float64 in mV, NaN where a sample is missing, and that rate in Hz."""
    given, record, leads = str(record), str(record).removesuffix(".hea").removesuffix(".dat"), lead_names(leads)
    if os.path.isfile(given) and not os.path.isfile(record + ".hea"):
        raise ValueError(f"{given}: neither a WFDB record nor .csv, .tsv, .txt or .npy; convert it")
    if not os.path.isfile(record + ".hea"):
        raise ValueError(f"{record}.hea: there is no such header file")
    wfdb = need("wfdb", "reading records")
    try:
        content = wfdb.rdrecord(record)
        signal, names, units, rate = content.p_signal, [name or "?" for name in content.sig_name or ()], content.units, float(content.fs)
    except Exception as error:  # wfdb raises many kinds for broken files
        raise ValueError(f"{record}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})") from error
    if signal is None or not len(signal):
        raise ValueError(f"{record}: holds no samples")
    column = {name.strip().upper(): i for i, name in reversed(list(enumerate(names)))}
    missing = [lead for lead in leads if lead.upper() not in column]
    if missing:
        raise ValueError(f"{record}: no lead {', '.join(missing)}; it has {', '.join(names)}")
    columns = [column[lead.upper()] for lead in leads]
    unknown = {units[i] for i in columns if units[i].strip().lower() not in MILLIVOLTS}
    if unknown:
        raise ValueError(f"{record}: unit {', '.join(sorted(unknown))} is not a voltage")
    return signal[:, columns].T * np.array([[MILLIVOLTS[units[i].strip().lower()]] for i in columns]), rate


def fill(ecg: np.ndarray) -> np.ndarray:
    """NaN and infinities as 0 (np.nan_to_num alone would turn infinity into 1.8e308)."""
    return np.where(np.isfinite(ecg), ecg, 0)


def resample(ecg: np.ndarray, rate_hz: float, to_hz: float) -> np.ndarray:
    """(L, T) at rate_hz -> (L, ceil(T to_hz / rate_hz)), anti-aliased; a line goes on past the ends, so that they do not ring.

    The median stays out of the filter, which passes a constant with a ripple of a thousandth: after a z-score a flat lead
    would look like an ECG, and a large offset would show.
    """
    if not 1 <= rate_hz <= 100_000:
        raise ValueError(f"a sample rate of {rate_hz} Hz: expected 1 to 100,000")
    if rate_hz == to_hz:
        return ecg
    ratio = Fraction(to_hz / rate_hz).limit_denominator(1000)
    level = np.median(ecg, axis=-1, keepdims=True)
    return level + need("scipy.signal", "resampling").resample_poly(ecg - level, ratio.numerator, ratio.denominator, axis=-1, padtype="line")


def preprocess(
    ecg: np.ndarray, *, sample_rate_hz: float = 500, normalize: str = "zscore", filter: str = "none", seconds: float = 10.0
) -> np.ndarray:
    """What an encoder sees: (L, T) in mV -> (L, seconds * sample_rate_hz) float32.

    1. NaN and infinite samples become 0.  2. Longer records are cut to their first `seconds`.  3. filter="ecgfounder":
    notch at 50 Hz, band-pass 0.67-40 Hz, running median of 0.4 s subtracted (ECGFounder's training); "none": nothing.
    4. normalize="zscore": minus the mean, over the standard deviation of *this view*, all its leads together, so that
    lead I alone is scored as at test time; "none": mV.  5. Shorter records get zeros at the end.
    Raises ValueError below 2.5 s.  The settings stand in every checkpoint (`load_encoder(path).preprocessing`).
    """
    ecg = np.asarray(ecg)
    if ecg.ndim != 2:
        raise ValueError(f"an ECG of shape {ecg.shape}: expected (leads, samples)")
    if ecg.shape[1] < MINIMUM_SECONDS * sample_rate_hz:
        raise ValueError(f"{ecg.shape[1] / sample_rate_hz:.2f} s of ECG is too short: at least {MINIMUM_SECONDS} s are needed")
    T = round(seconds * sample_rate_hz)
    ecg = fill(ecg[:, :T].astype(np.float64))
    if filter == "ecgfounder":
        ecg = ecgfounder_filter(ecg, sample_rate_hz)
    elif filter != "none":
        raise ValueError(f"filter {filter!r}: expected 'none' or 'ecgfounder'")
    if normalize == "zscore":
        deviation = ecg.std()
        ecg = (ecg - ecg.mean()) / (deviation if deviation > 0 else 1.0)  # a flat record stays flat
    elif normalize != "none":
        raise ValueError(f"normalize {normalize!r}: expected 'zscore' or 'none'")
    return np.pad(ecg, ((0, 0), (0, T - ecg.shape[1]))).astype(np.float32)


def ecgfounder_filter(ecg: np.ndarray, sample_rate_hz: float) -> np.ndarray:
    """Notch, band-pass (both zero-phase) and median baseline of ECGFounder's data loader; (L, T) float64."""
    signal, nyquist = need("scipy.signal", "filtering"), sample_rate_hz / 2
    if nyquist > 50:  # at 100 Hz there is nothing left at 50 Hz to notch
        ecg = signal.filtfilt(*signal.iirnotch(50, 30, sample_rate_hz), ecg)
    ecg = signal.sosfiltfilt(signal.butter(4, [0.67, min(40, 0.99 * nyquist)], "bandpass", fs=sample_rate_hz, output="sos"), ecg)
    width = 2 * round(0.2 * sample_rate_hz) + 1
    return ecg - np.stack([signal.medfilt(lead, width) for lead in ecg])


# ----------------------------------------------------------------------------------------------------------------------
# Records: lists of ECGs on disk
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Records:
    """A list of records as columns (800,035 of MIMIC-IV-ECG take about 60 MB); index it with an array for a part of it."""

    sources: tuple[tuple[str, str], ...]  # (kind, root): "ptb-xl", "mimic-iv-ecg", "wfdb" or "synthetic", and its folder or seed
    source: np.ndarray  # (N,) int16, index into sources
    paths: np.ndarray  # (N,) bytes, below the root, without .hea; a synthetic record's index
    patients: np.ndarray  # (N,) int64; unknown patients are negative and all different
    folds: np.ndarray  # (N,) int8, 1 to 10; 0 where the collection has none, 11 for synthetic records that only train
    labels: np.ndarray | None  # (N, 44) uint8 in the order of STATEMENTS; None if a source has none

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows) -> "Records":
        labels = None if self.labels is None else self.labels[rows]
        return Records(self.sources, self.source[rows], self.paths[rows], self.patients[rows], self.folds[rows], labels)

    def __add__(self, other: "Records") -> "Records":
        labels = None if self.labels is None or other.labels is None else np.concatenate([self.labels, other.labels])
        columns = [np.concatenate([getattr(self, c), getattr(other, c)]) for c in ("paths", "patients", "folds")]
        return Records(self.sources + other.sources, np.concatenate([self.source, other.source + len(self.sources)]), *columns, labels)

    def name(self, i: int) -> str:
        """The record's path, or synthetic:seed/index."""
        kind, root = self.sources[self.source[i]]
        path = os.fsdecode(self.paths[i])
        return f"synthetic:{root}/{path}" if kind == "synthetic" else os.path.join(root, path)

    def read(self, i: int, leads: Sequence[str] = LEADS, sample_rate_hz: float = 500) -> np.ndarray:
        """(len(leads), T) float32 mV; errors as read_ecg."""
        kind, root = self.sources[self.source[i]]
        if kind == "synthetic":
            return synthesize(1, int(root), first=int(self.paths[i]), leads=leads, sample_rate_hz=sample_rate_hz)[0][0]
        return read_ecg(self.name(i), leads, sample_rate_hz)

    def patient_keys(self) -> np.ndarray:
        """(N,) int64, different for patients of different collections too."""
        return self.patients + self.source.astype(np.int64) * 10**12

    def digest(self) -> str:
        """Changes with the list, its order and its roots."""
        text = hashlib.sha256(json.dumps(self.sources).encode())
        for column in (self.source, self.paths):
            text.update(np.ascontiguousarray(column).tobytes())
        return text.hexdigest()


def find_records(data: str, *, sample_rate_hz: float = 500, seed: int = 0) -> Records:
    """The records of a collection.

    data: the folder of PTB-XL (ptbxl_database.csv; records100/ at 100 Hz and below, else records500/), of MIMIC-IV-ECG
    (record_list.csv), any folder of WFDB records, or "synthetic:N" (from `seed`).  No signal is read: a record that is
    listed but missing shows when it is read.  Raises ValueError that says what was looked for, and where.
    """
    if data.startswith("synthetic:"):
        count = data.removeprefix("synthetic:")
        if not count.isdigit() or not int(count):
            raise ValueError(f"--data {data}: expected synthetic:N with N records, e.g. synthetic:20000")
        i = np.arange(int(count))
        labels = synthesize(len(i), seed, leads=())[1]
        return as_records("synthetic", str(seed), list(map(str, i)), i, i % 10 + 1, labels)
    root = Path(os.path.abspath(data))  # the cache is named by it
    if not root.is_dir():
        raise ValueError(f"{data}: there is no such folder; give a folder of records or synthetic:N")
    if (root / "ptbxl_database.csv").is_file():
        return find_ptbxl(root, "filename_lr" if sample_rate_hz <= 100 and (root / "records100").is_dir() else "filename_hr")
    if (root / "record_list.csv").is_file():
        rows = [(row["path"], int(row["subject_id"])) for row in read_table(root / "record_list.csv", "path", "subject_id")]
        return as_records("mimic-iv-ecg", str(root), [path for path, _ in rows], [patient for _, patient in rows])
    found, lists = [], {"ptbxl_database.csv", "record_list.csv"}
    inside = any(os.path.isfile(above / name) for above in list(root.parents)[:4] for name in lists)
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        if inside or lists & set(files):
            raise ValueError(f"{data}: a part of a collection, or more than one: give the folder of its ptbxl_database.csv or record_list.csv, so that folds and patients are known")
        found += [os.path.relpath(os.path.join(folder, f), root).removesuffix(".hea") for f in sorted(files) if f.endswith(".hea")]
    if not found:
        raise ValueError(f"{data}: no ptbxl_database.csv, no record_list.csv and no .hea file in or below it; is it the right folder?")
    return as_records("wfdb", str(root), found)


def as_records(kind, root, paths, patients=None, folds=None, labels=None) -> Records:
    """The columns of one collection; what is unknown gets the values that `Records` gives it."""
    n = len(paths)
    patients = -1 - np.arange(n) if patients is None else patients
    folds = np.zeros(n) if folds is None else folds
    paths = np.array([os.fsencode(path) for path in paths], "S")
    return Records(((kind, root),), np.zeros(n, np.int16), paths, np.asarray(patients, np.int64), np.asarray(folds, np.int8), labels)


def read_table(path: Path, *columns: str):
    """Rows of a csv file as dicts; ValueError if a column is missing or no row is there."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [c for c in columns if c not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ()) or 'nothing'}")
        n = 0
        for n, row in enumerate(reader, 1):
            yield row
        if not n:
            raise ValueError(f"{path}: lists no record")


def find_ptbxl(root: Path, column: str) -> Records:
    """PTB-XL 1.0.1 or 1.0.3: a diagnostic statement counts at any likelihood, 0 included, as in its published benchmark."""
    paths, patients, folds, labels = [], [], [], []
    index = {statement: k for k, statement in enumerate(STATEMENTS)}
    for row in read_table(root / "ptbxl_database.csv", "patient_id", "scp_codes", "strat_fold", column):
        paths.append(row[column].removesuffix(".hea"))
        patients.append(int(float(row["patient_id"])))
        folds.append(int(row["strat_fold"]))
        label = np.zeros(len(STATEMENTS), np.uint8)
        label[[index[code] for code in ast.literal_eval(row["scp_codes"]) if code in index]] = 1
        labels.append(label)
    return as_records("ptb-xl", str(root), paths, patients, folds, np.array(labels))


# ----------------------------------------------------------------------------------------------------------------------
# Self-cut pairs: lead I and all twelve leads of one record, Eq. (1)
# ----------------------------------------------------------------------------------------------------------------------


def self_cut(multi, lead: str = "I"):
    """Eq. (1): the pair (S, M) of one record, S = M[lead] with nothing else changed.

    multi: (..., 12, T) array or tensor with its leads in the order of LEADS.  Returns ((..., 1, T), (..., 12, T)).
    """
    if multi.shape[-2] != len(LEADS):
        raise ValueError(f"an array of shape {tuple(multi.shape)} has {multi.shape[-2]} leads; the cut needs all {len(LEADS)} in the order of LEADS")
    i = lead_index(lead)
    return multi[..., i : i + 1, :], multi


def lead_names(leads: str | Sequence[str]) -> tuple[str, ...]:
    """One name, which is no sequence of letters here, or several."""
    return (leads,) if isinstance(leads, str) else tuple(leads)


def lead_index(lead: str) -> int:
    """Position in LEADS, whatever the case."""
    names = [name.upper() for name in LEADS]
    if lead.upper() not in names:
        raise ValueError(f"lead {lead!r}: expected one of {', '.join(LEADS)}")
    return names.index(lead.upper())


class SelfCuttingDataset(Dataset):
    """Item i is the S-M pair of record i, each preprocessed on its own: (1, T) and (12, T) float32 tensors.

    records: `Records` (see find_records), a list of WFDB paths, or an array (N, L, T) in mV at sample_rate_hz whose rows
        are named by `leads` (an array does not say which row is which lead: MIMIC-IV-ECG has aVF before aVL).
    lead: the single lead; "all" makes S the twelve leads too.
    multi: False reads and returns S alone, with an empty tensor in place of M.
    preprocessing: keyword arguments of `preprocess`.
    A record that cannot be read, is too short, lacks a lead, or is flat in a view raises ValueError naming it.
    """

    def __init__(self, records, lead: str = "I", *, leads: str | Sequence[str] | None = None, sample_rate_hz: float = 500, multi: bool = True, **preprocessing):
        self.records, self.sample_rate_hz, self.preprocessing = records, sample_rate_hz, preprocessing
        self.lead = lead if lead == "all" else LEADS[lead_index(lead)]
        self.multi = multi
        self.reads = LEADS if multi or lead == "all" else (self.lead,)
        if isinstance(records, (np.ndarray, torch.Tensor)):
            leads = () if leads is None else lead_names(leads)
            if records.ndim != 3 or len(leads) != records.shape[1]:
                raise ValueError(
                    f"an array of shape {tuple(records.shape)} and {len(leads)} names of leads: expected (records, leads, samples) and "
                    "leads=, a name for each row of a record, e.g. LEADS; of one record give ecg[None]"
                )
            upper = [name.upper() for name in leads]
            missing = [name for name in self.reads if name.upper() not in upper]
            if missing:
                raise ValueError(f"the array has no lead {', '.join(missing)}; its rows are {', '.join(leads)}")
            self.rows = [upper.index(name.upper()) for name in self.reads]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.records, Records):
            ecg, name = self.records.read(i, self.reads, self.sample_rate_hz), self.records.name(i)
        elif isinstance(self.records, (np.ndarray, torch.Tensor)):
            ecg, name = np.asarray(self.records[i])[self.rows], f"record {i}"
        else:
            ecg, name = read_ecg(self.records[i], self.reads, self.sample_rate_hz), str(self.records[i])
        single = ecg if len(self.reads) == 1 or self.lead == "all" else self_cut(ecg, self.lead)[0]
        multi = self.view(ecg, name) if self.multi else torch.empty(0)
        return (multi if single is ecg and self.multi else self.view(single, name)), multi

    def view(self, ecg: np.ndarray, name: str) -> torch.Tensor:
        """`preprocess`, refusing what carries no signal."""
        try:
            seen = preprocess(ecg, sample_rate_hz=self.sample_rate_hz, **self.preprocessing)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not np.ptp(fill(ecg)[:, : seen.shape[1]], axis=1).any():  # before filter and padding, which would hide it
            raise ValueError(f"{name}: {f'lead {self.lead}' if len(ecg) == 1 else 'every lead'} is flat or has no valid sample")
        return torch.from_numpy(seen)


# ----------------------------------------------------------------------------------------------------------------------
# Loss: Eq. (3) and its variants
# ----------------------------------------------------------------------------------------------------------------------


def pair_logits(single, multi, scale, normalize: bool, first: int) -> torch.Tensor:
    """scale * similarity of every S with every M, (B, N), in float32 at least: half precision costs 3e-3 of the loss."""
    B, N = len(single), len(multi)
    if single.ndim != 2 or multi.ndim != 2 or single.shape[1] != multi.shape[1] or not 0 <= first <= N - B or not B:
        shapes = f"{tuple(single.shape)} and {tuple(multi.shape)}"
        raise ValueError(f"embeddings of shape {shapes}: expected (B, D) and (N, D) with N >= B > 0 and partners from column {first}")
    dtype = torch.promote_types(torch.promote_types(single.dtype, multi.dtype), torch.float32)
    single, multi = single.to(dtype), multi.detach().to(dtype)  # f_m is frozen: stopgrad of Eq. (2)
    if normalize:
        single, multi = F.normalize(single, dim=-1), F.normalize(multi, dim=-1)
    return scale * (single @ multi.T)


def siglip_loss(
    single: torch.Tensor,
    multi: torch.Tensor,
    *,
    scale: float | torch.Tensor = 1 / 0.07,
    bias: float | torch.Tensor = 0.0,
    normalize: bool = True,
    first: int = 0,
) -> torch.Tensor:
    """Eq. (3): every pair of the batch is a yes-or-no question, summed over each row, averaged over rows.  A scalar.

    single: (B, D) embeddings of lead I.  multi: (N, D), N >= B, embeddings of twelve leads; record i's partner is row
    first + i.  With W processes each passes its own B rows of `single` and all N = W B rows of `multi`: the mean over
    processes is then Eq. (3) of the whole batch, gradients included.
    The defaults are the paper's: cosine over t = 0.07, b = 0.  `bias` is added to the logits, so it is -b of Eq. (3).
    Under autocast the product itself would be half precision, so autocast is off inside.
    """
    with torch.autocast(single.device.type, enabled=False):
        logits = pair_logits(single, multi, scale, normalize, first) + bias  # (B, N)
        z = torch.full_like(logits, -1)
        z.diagonal(first)[: len(single)] = 1  # z_ij = +1 for the record's own M, -1 for all others
        return -F.logsigmoid(z * logits).sum() / len(single)  # Eq. (3)


def softmax_loss(single: torch.Tensor, multi: torch.Tensor, *, scale: float | torch.Tensor = 1 / 0.07, first: int = 0) -> torch.Tensor:
    """InfoNCE, for comparison: cross-entropy of cosine * scale over each row.  Shapes as in siglip_loss."""
    with torch.autocast(single.device.type, enabled=False):
        logits = pair_logits(single, multi, scale, True, first)
        return F.cross_entropy(logits, torch.arange(first, first + len(single), device=logits.device))


LOSSES = ("paper", "learnable", "raw", "softmax")


class SelfMIS(nn.Module):
    """The single-lead encoder f_s together with its loss: what pre-training trains.

    loss: "paper" (cosine / 0.07, b = 0); "learnable" (logits = exp(log_scale) cosine + bias, from 10 and -10, trained
    here so that data-parallel processes agree on them); "raw" (inner product x 0.07, the paper's words taken literally);
    "softmax".
    """

    def __init__(self, encoder: ResNet1D, loss: str = "paper"):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r}: expected one of {', '.join(LOSSES)}")
        self.encoder, self.loss = encoder, loss
        if loss == "learnable":
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
            self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, single: torch.Tensor, multi: torch.Tensor, first: int = 0) -> torch.Tensor:
        """single: (B, 1, T) signals; multi: (N, D) embeddings of the frozen f_m.  Eq. (2), then the loss."""
        return self.compare(self.encoder(single), multi, first)

    def compare(self, single: torch.Tensor, multi: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The loss of embeddings, (B, D) and (N, D)."""
        if self.loss == "softmax":
            return softmax_loss(single, multi, first=first)
        if self.loss == "learnable":
            return siglip_loss(single, multi, scale=self.log_scale.exp(), bias=self.bias, first=first)
        if self.loss == "raw":
            return siglip_loss(single, multi, scale=0.07, normalize=False, first=first)
        return siglip_loss(single, multi, first=first)


def prior_plateau(batch: int) -> float:
    """Eq. (3) where every logit is the same best constant: a run that stays here has learned nothing but the prior."""
    return math.log(batch - 1) + batch * math.log(1 + 1 / (batch - 1)) if batch > 1 else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Metrics: by hand, exact with ties, on whole sets
# ----------------------------------------------------------------------------------------------------------------------


def as_scores(y, score) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool and scores as float arrays, checked; NumPy has no bfloat16."""
    y, score = (np.asarray(a.detach().cpu().to(torch.promote_types(a.dtype, torch.float32)) if isinstance(a, torch.Tensor) else a) for a in (y, score))
    if y.shape != score.shape or not y.size:
        raise ValueError(f"labels of shape {y.shape} and scores of shape {score.shape}: expected equal, non-empty shapes")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1; found {y[~np.isin(y, (0, 1))].flat[0]}")
    if np.isnan(score).any():
        raise ValueError(f"{np.isnan(score).sum()} of {score.size} scores are NaN")
    return y.astype(bool), score


def roc_auc(y: np.typing.ArrayLike, score: np.typing.ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half.

    y: (N,) of 0 and 1.  score: (N,), higher = more likely 1; give float32 logits (a half-precision sigmoid makes ties).
    From 0 to 1; NaN if a class is absent.  ValueError: other shapes, other labels, NaN among the scores.
    """
    y, score = as_scores(y, score)
    if y.ndim != 1:
        raise ValueError(f"labels of shape {y.shape}: expected (N,); macro_auc takes (N, K)")
    order = np.argsort(score, kind="stable")
    y, score = y[order], score[order]
    last = np.append(np.flatnonzero(score[1:] != score[:-1]), len(score) - 1)  # last row of each run of equal scores
    positives = np.diff(np.cumsum(y)[last], prepend=0)  # in each run
    negatives = np.diff(last, prepend=-1) - positives
    pairs = int(positives.sum()) * int(negatives.sum())
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else math.nan


def macro_auc(y: np.typing.ArrayLike, score: np.typing.ArrayLike) -> tuple[float, np.ndarray]:
    """(mean AUC over the classes that have positives and negatives, AUC of each class (K,), NaN where absent).

    y, score: (N, K).  Compute it once on a whole set: a mean over batches or processes is another number.
    """
    y, score = as_scores(y, score)
    if y.ndim != 2:
        raise ValueError(f"labels of shape {y.shape}: expected (N, K)")
    each = np.array([roc_auc(y[:, k], score[:, k]) for k in range(y.shape[1])])
    return (float(np.nanmean(each)) if np.isfinite(each).any() else math.nan), each


def bootstrap_auc(y: np.typing.ArrayLike, score: np.typing.ArrayLike, groups=None, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """AUC of every class in `draws` resamples of whole groups (patients), (draws, K); NaN for an absent class.

    y, score: (N, K).  groups: (N,), one value a patient; None: each row is one.
    `interval(draws[:, k])` is the interval of class k, `interval(np.nanmean(draws, 1))` that of macro_auc's mean.
    A draw without a positive or a negative of a present class is drawn again.  Which rows are drawn depends on
    (y, groups, seed) alone, so the difference of two results on one test set is a paired bootstrap.
    """
    y, score = as_scores(y, score)
    if y.ndim != 2 or groups is not None and len(groups) != len(y):
        of = "" if groups is None else f" with {len(groups)} groups"
        raise ValueError(f"labels of shape {y.shape}{of}: expected (N, K), and a group for each of the N")
    rng = np.random.default_rng(seed)
    group_of = np.arange(len(y)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    G = group_of.max() + 1
    present = np.flatnonzero(y.any(0) & ~y.all(0))
    weights = np.empty((draws, len(y)), np.float32)  # how often each row is drawn
    done, attempts = 0, 0
    while done < draws:
        w = rng.multinomial(G, np.full(G, 1 / G), size=64)[:, group_of].astype(np.float32)  # (64, N)
        ones = w @ y[:, present]
        keep = w[((ones > 0) & (ones < w.sum(1, keepdims=True))).all(1)][: draws - done]
        weights[done : done + len(keep)] = keep
        done, attempts = done + len(keep), attempts + 1
        if attempts > 100 * draws:
            raise ValueError(f"no resample of {G} groups has a positive and a negative of every class; leave out the rarest class")
    auc = np.full((draws, y.shape[1]), np.nan)
    for k in present:
        order = np.argsort(score[:, k], kind="stable")
        ranked = score[order, k]
        last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        for part in np.array_split(np.arange(draws), max(1, draws // 100)):  # bounded memory
            w = weights[part][:, order].astype(np.float64)
            cum_pos, cum_all = np.cumsum(w * y[order, k], 1)[:, last], np.cumsum(w, 1)[:, last]
            positives, negatives = np.diff(cum_pos, prepend=0), np.diff(cum_all - cum_pos, prepend=0)
            below = np.cumsum(negatives, 1) - negatives
            auc[part, k] = (positives * (below + negatives / 2)).sum(1) / (positives.sum(1) * negatives.sum(1))
    return auc


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap draws (R,) of one number, (low, high); NaN if there is nothing to draw from."""
    values = np.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"draws of shape {values.shape}: expected (R,), those of one class or of a mean")
    if not np.isfinite(values).all():
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@torch.no_grad()
def retrieval(single: torch.Tensor, multi: torch.Tensor, k: Sequence[int] = (1, 5, 10), chunk: int = 1024) -> dict[int, float]:
    """R@k in percent: how often record i's own M is among the k nearest (cosine) of S_i; ties count against it.

    single, multi: (N, D).  Memory is bounded by chunk x N.  ValueError: other shapes, k > N, values that are not finite.
    """
    single, multi = (torch.as_tensor(a) for a in (single, multi))
    N = len(single)
    if single.ndim != 2 or single.shape != multi.shape or not N:
        raise ValueError(f"embeddings of shape {tuple(single.shape)} and {tuple(multi.shape)}: expected (N, D) twice")
    if not all(1 <= n <= N for n in k):
        raise ValueError(f"k = {', '.join(map(str, k))} of {N} records: expected 1 to {N}")
    single, multi = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (single, multi))
    if not (torch.isfinite(single).all() and torch.isfinite(multi).all()):
        raise ValueError("embeddings hold NaN or infinity")
    single, multi = F.normalize(single, dim=-1), F.normalize(multi, dim=-1).to(single.dtype)
    better = []  # how many others are as near as record i's own; equal columns differ by rounding, hence the 1e-6
    for i in range(0, N, chunk):
        cosine = single[i : i + chunk] @ multi.T  # (chunk, N)
        better.append((cosine >= cosine.diagonal(i)[:, None] - 1e-6).sum(1) - 1)
    better = torch.cat(better)
    return {n: 100 * float((better < n).double().mean()) for n in k}


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic ECG
#
# A beat is a sum of 16 Gaussian bumps with amplitudes in eight leads. They are split into a dipole (a vector through
# the chest: X left, Y foot, Z back, seen by Dower's lead vectors) and what the dipole misses. An infarct edits the
# dipole: injury current pulls ST and T towards the wall, a scar takes away the forces that pointed to it. Noise enters
# at nine electrodes; III and the augmented leads are derived last, so Einthoven's law holds to the last bit.
#
# BEATS, REMODELLING, SCAR, BEYOND, the times in WALLS and the spreads are fitted to PTB-XL, folds 1-7 (Wagner et al. 2020,
# PhysioNet, CC BY 4.0: keep this attribution). DOWER: lead vectors of Dower 1968/1980. STAGES, the directions of the
# walls and the noise are our own choice. IPLMI, IPMI and PMI rest on 35, 19 and 8 records: take them as a sketch.
# ----------------------------------------------------------------------------------------------------------------------

ABNORMAL = ("LVH", "ISCAL", "NST_", "NDT", "LAFB", "CLBBB", "CRBBB")       # negatives that are not normal either
SYNTHETIC_TYPES = ("NORM",) + MI_TYPES + ABNORMAL
# How often each type is drawn: half infarcts, less lopsided than in PTB-XL so that the rare ones occur too.
TYPE_SHARES = (.35,) + (.03, .04, .15, .05, .16, .02, .015, .025, .01) + (.025, .01, .015, .04, .03, .02, .01)
INDEPENDENT = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")
DERIVED = {lead: np.array(weights, np.float32) for lead, weights in                                        # of I and II
           {"III": (-1, 1), "aVR": (-.5, -.5), "aVL": (1, -.5), "aVF": (-.5, 1)}.items()}

DOWER = np.array([[.632, -.235, .059], [.235, 1.066, -.132], [-.515, .157, -.917], [.044, .164, -1.387],     # I II V1 V2
                  [.882, .098, -1.277], [1.213, .127, -.601], [1.125, .127, -.086], [.831, .076, .230]])     # V3..V6

BUMPS = np.array([[-168, 20], [-140, 20],                                               # P: ms after R, width in ms
                  [-30, 6], [-21, 6], [-12, 6], [-4, 6], [4, 6], [12, 6], [20, 6], [29, 7],             # QRS
                  [62, 26], [108, 31], [154, 31], [200, 31], [246, 31], [292, 31]])                     # ST and T
P, QRS, STT = slice(0, 2), slice(2, 10), slice(10, 16)
CENTRE, WIDTH = BUMPS.T.astype(float)
CENTRE32, SHARPNESS32 = CENTRE[:, None].astype(np.float32), (1 / WIDTH)[:, None].astype(np.float32)

# Amplitudes of the bumps in I, II, V1..V6 in hundredths of a millivolt: mean beats of PTB-XL. Conduction blocks have
# beats of their own, all others edit the normal one.
BEATS = {
"normal": (
    (2, 6, 3, 4, 4, 4, 3, 2), (6, 8, -2, 1, 3, 4, 4, 4), (-2, -2, 10, 14, 7, 2, -2, -4), (4, 5, 10, 31, 29, 17, 10, 4),
    (22, 21, -5, 21, 39, 41, 36, 26), (47, 55, -42, -21, 43, 90, 90, 70), (47, 54, -57, -47, 26, 84, 89, 74),
    (15, 14, -39, -62, -36, -5, 14, 23), (-4, -4, -20, -48, -53, -39, -20, -5), (-1, -2, -16, -27, -26, -16, -7, -1),
    (-1, -1, 2, 2, 0, -2, -2, -1), (1, 1, 5, 10, 9, 5, 2, 1), (1, 2, 2, 9, 8, 5, 2, 1),
    (6, 7, 6, 24, 23, 15, 9, 6), (15, 16, 0, 31, 34, 28, 22, 16), (10, 16, 1, 19, 24, 22, 19, 14)),
"LAFB": (
    (2, 7, 2, 4, 5, 5, 4, 3), (5, 5, -3, 0, 2, 3, 3, 3), (-3, 4, 4, 2, 3, 3, 1, 1), (-3, 4, 6, 6, 8, 6, 3, 1),
    (20, 15, -8, 16, 38, 58, 56, 37), (52, 14, -29, 20, 60, 91, 87, 60), (32, -19, -26, -23, -21, -11, 1, 8),
    (4, -26, -15, -43, -61, -56, -35, -18), (3, -16, -9, -17, -24, -21, -14, -8), (0, -11, -2, -8, -15, -17, -14, -9),
    (-4, -6, 9, 2, -3, -7, -7, -6), (-1, 2, 3, 5, 5, 3, 1, 0), (0, 1, 2, 5, 4, 2, 0, 0),
    (2, 6, 3, 14, 15, 10, 5, 4), (7, 9, 1, 18, 20, 16, 11, 8), (9, 11, 0, 17, 20, 17, 13, 10)),
"CLBBB": (
    (4, 9, 0, 4, 6, 5, 3, 2), (0, 0, -2, -3, -3, -2, -1, 0), (0, 1, 3, 6, 5, 3, 1, 1), (9, 9, -22, -19, -3, 13, 14, 10),
    (27, 17, -77, -107, -74, -2, 30, 29), (37, 20, -110, -163, -145, -48, 30, 42), (40, 19, -103, -153, -146, -69, 29, 50),
    (32, 4, -67, -103, -100, -54, 23, 43), (27, -5, -45, -65, -62, -34, 23, 37), (21, -8, -23, -28, -27, -18, 11, 23),
    (9, -9, -7, -12, -16, -20, -8, 6), (-10, -2, 21, 29, 24, 8, -9, -12), (-7, -3, 19, 28, 23, 7, -7, -9),
    (-12, -1, 35, 56, 49, 20, -10, -16), (-13, -1, 34, 55, 51, 24, -7, -15), (-3, 8, 17, 35, 37, 24, 4, -3)),
"CRBBB": (
    (3, 7, 0, 4, 5, 5, 4, 3), (3, 3, -2, -1, 0, 1, 2, 2), (1, 1, 5, 9, 10, 9, 7, 4), (3, 1, 9, 16, 16, 11, 8, 4),
    (46, 26, -12, 49, 89, 112, 101, 63), (7, -3, 0, -4, -7, -18, -6, 5), (-12, -10, 15, 4, -15, -31, -29, -17),
    (-7, -5, 24, 27, 17, 2, -6, -8), (-8, -4, 21, 14, 3, -7, -10, -8), (-7, -4, 25, 8, 2, -2, -5, -5),
    (-18, -8, 41, 2, -9, -16, -16, -13), (1, 0, -5, -3, -2, 0, 1, 1), (2, 1, -5, -2, -1, 0, 0, 0),
    (6, 4, -8, 0, 3, 6, 6, 4), (11, 7, -18, -7, -2, 7, 11, 10), (17, 15, -14, 12, 20, 22, 21, 16))}

QRS_LATER = np.array([0, 6, 0, 12])                                      # ms, of these QRS bumps before they are stretched

# How such hearts differ apart from the infarct: QRS gain, T gain, QRS axis (degrees), QRS width, and at strain 1 the ST
# and T (mV) that go missing on the left side.
REMODELLING = {
    "NORM":  (1.00, 1.00,   0, 1.00, 0.00, 0.00),  "ALMI":  (1.18, 1.17, -36, 1.00, 0.11, 0.58),
    "AMI":   (1.15, 1.26, -14, 0.93, 0.14, 0.03),  "ASMI":  (1.24, 1.11, -17, 1.12, 0.06, 0.45),
    "ILMI":  (1.14, 1.13,   5, 0.96, 0.15, 0.46),  "IMI":   (1.16, 1.13, -10, 0.91, 0.11, 0.27),
    "IPLMI": (1.25, 0.71, -11, 1.18, 0.09, 0.30),  "IPMI":  (1.16, 0.86,  -4, 1.16, 0.16, 0.19),
    "LMI":   (1.13, 0.90,  -4, 1.17, 0.12, 0.22),  "PMI":   (1.20, 0.80, -11, 0.91, 0.12, 0.09),
    "LVH":   (1.39, 1.01,  -7, 1.59, 0.22, 0.57),  "ISCAL": (1.09, 0.62, -10, 1.13, 0.21, 0.43),
    "NST_":  (1.02, 0.65,  -5, 0.90, 0.16, 0.13),  "NDT":   (0.96, 0.63,  -6, 0.90, 0.08, 0.20),
    "LAFB":  (1.25, 1.25, -11, 0.90, 0.00, 0.02),  "CLBBB": (1.13, 1.05,  -5, 1.62, 0.00, 0.00),
    "CRBBB": (1.41, 1.21,   4, 1.26, 0.00, 0.00)}
LATERAL = (1.1, .3, .25)                                                 # direction of that loss

# Walls: direction from the middle of the heart; when its forces are lost (ms after R, width); sign of its early T.
WALLS = {"septal": ((-.20, .00, -.98), -14, 9, 1), "anterior": ((.45, -.25, -.86), -5, 10, 1),
         "high lateral": ((.65, -.75, .10), -4, 21, 1), "low lateral": ((.90, .10, .42), -4, 10, 1),
         "inferior": ((-.15, .97, .18), -3, 13, 1), "posterior": ((.20, .18, .96), 2, 9, -.6)}
# Part of each wall (in the order of WALLS) in the injury current and in the scar. Scars also hold what the dipole model
# cannot say otherwise, hence more walls than the name tells.
INJURY = {"ALMI": (.2, .9, .5, .6, 0, 0), "AMI": (.35, 1, 0, 0, 0, 0), "ASMI": (.6, 1, 0, 0, 0, 0),
          "ILMI": (0, 0, 0, .6, .85, 0), "IMI": (0, 0, 0, 0, .9, 0), "IPLMI": (0, 0, 0, .55, .75, .55),
          "IPMI": (0, 0, 0, 0, .8, .7), "LMI": (0, 0, .9, .55, 0, 0), "PMI": (0, 0, 0, .15, 0, 1.1)}
SCAR = {"ALMI": (1.45, 1.60, .40, 1.50, 0, 1.05), "AMI": (.50, .95, 0, .25, 0, 1.10),
        "ASMI": (.65, 1.60, .10, .95, .30, .35), "ILMI": (0, .80, .05, 1.25, 1.30, .45),
        "IMI": (.20, .05, 0, .70, .55, .15), "IPLMI": (0, 0, 0, 1.05, .45, 1.45),
        "IPMI": (0, 0, 0, .15, .50, 1.30), "LMI": (1.55, 1.00, .65, .85, .65, 1.35),
        "PMI": (0, 0, 0, .70, .10, 1.50)}
# What is left of the mean QRS of these types when the scars above are taken out, in some places a compromise with the
# medians of Q and R: three shapes (see SHAPES) in I, II, V1..V6, in hundredths of a millivolt for each millivolt of lost forces.
BEYOND = {
    "ALMI": ((8, 11, -6, -56, -40, 9, 14, 21), (4, 31, -26, -6, 1, -48, -22, -32), (7, -46, -2, 53, 41, 36, 5, 8)),
    "AMI":  ((10, 18, -6, -12, 25, 35, 27, 18), (-10, -1, -4, 3, -13, 4, -3, -8), (13, -13, 0, 14, -3, -7, -6, 0)),
    "ASMI": ((10, 19, -11, -31, 18, 55, 33, 21), (-7, 3, 12, 19, -46, -65, -11, -8), (6, -19, 15, 43, 33, 7, -8, -12)),
    "ILMI": ((-4, 10, -4, -2, 1, 5, 3, 12), (3, -2, 7, 28, 44, 14, -13, -41), (22, 11, -35, -30, -28, 1, 23, 30)),
    "IMI":  ((14, -1, -6, -7, 16, 24, 17, 16), (-7, 9, 7, 20, -46, -29, -15, -23), (11, 13, -4, -3, 6, 0, 3, 13)),
    "LMI":  ((1, 5, 3, 0, 5, 20, 10, 4), (-6, 7, -3, -26, -13, -19, 2, 2), (2, -11, -4, 10, -2, -7, -4, -1)),
}
# Per stage, uniform between two values at severity 1: ST and T vector (mV), lost forces (mV), share of T lost, strain.
STAGES = {"hyperacute": ((.03, .12), (.30, .70), (.00, .05), (.0, .0), (0, .2)),
          "acute":      ((.14, .40), (.10, .40), (.05, .40), (.0, .3), (0, .3)),
          "subacute":   ((.03, .12), (-.50, -.15), (.40, .80), (.2, .6), (0, 1)),
          "old":        ((-.02, .03), (-.14, .10), (.50, 1.1), (.1, .7), (0, 1))}
STAGE_SHARES = (.03, .07, .20, .70)                                      # PTB-XL's infarcts are mostly old

# How patients differ (standard deviations). Log gain: QRS, T with QRS, T alone, P. Axes: degrees about X, Y, Z.
GAIN_SPREAD = np.array([.20, .30, .21, .33])
AXIS_SPREAD = np.array([[10, 12, 20], [6, 21, 14], [6, 9, 8]])           # P, QRS, T
BUMP_SPREAD = np.repeat([.15, .08], (10, 6))[:, None]                    # each bump, relative
SHAPE_SPREAD = np.array([.08, .08, .09, .15, .12, .06, .04, .05])        # mV per lead beyond the dipole
ST_SPREAD = np.array([.03, .02, .04])                                    # mV, level of the J point along X, Y, Z
SHORTEST_RR = .25                                                        # seconds
WANDER_GAIN = np.array([1, 1, 1.4] + [1.3] * 6)                          # by electrode, RA LA LL V1..V6
TONES_HZ = np.array([.05, .09, .13, .18, .23, .3, .4, .55, 50, 60])      # baseline wander, then mains


def _bumps_for(family, target):
    """Weights with which a family of bumps adds up to about target(ms after R)."""
    ms = np.arange(-60., 420.)
    bumps = np.exp(-.5 * ((ms[:, None] - CENTRE[family]) / WIDTH[family]) ** 2)
    return np.linalg.solve(bumps.T @ bumps + .5 * np.eye(bumps.shape[1]), bumps.T @ target(ms))


AMPLITUDE = np.array(list(BEATS.values())) / 100                                                           # (4, 16, 8) mV
TO_DIPOLE = np.linalg.pinv(DOWER).T
ST_PLATEAU = _bumps_for(STT, lambda ms: 1 / (1 + np.exp((45 - ms) / 6)) / (1 + np.exp((ms - 250) / 22)))
T_WAVE = _bumps_for(STT, lambda ms: np.exp(-.5 * ((ms - 258) / np.where(ms < 258, 48, 34)) ** 2))
DIRECTION = np.array([w[0] for w in WALLS.values()])
DIRECTION /= np.linalg.norm(DIRECTION, axis=1, keepdims=True)
LOST = np.array([_bumps_for(QRS, lambda ms, w=w: np.exp(-.5 * ((ms - w[1]) / w[2]) ** 2)) for w in WALLS.values()])
SHAPES = np.exp(-.5 * ((np.array([[-18.], [0], [18]]) - CENTRE[QRS]) / 10) ** 2)                           # (3, 8)
CROSS = np.array([[0, 0, 0, 0, 0, -1, 0, 1, 0], [0, 0, 1, 0, 0, 0, -1, 0, 0], [0, -1, 0, 1, 0, 0, 0, 0, 0]])


class _Draws:
    """Deals out the random numbers of B records in a fixed order; each record brings its own generator."""

    def __init__(self, generators, normals, uniforms):
        self.uniforms = np.stack([g.random(uniforms) for g in generators])
        self.normals = np.stack([g.standard_normal(normals) for g in generators])

    def normal(self, *shape):                                                                              # (B, *shape)
        k = int(np.prod(shape))
        dealt, self.normals = self.normals[:, :k], self.normals[:, k:]
        return dealt.reshape(-1, *shape)

    def uniform(self, *shape):
        k = int(np.prod(shape))
        dealt, self.uniforms = self.uniforms[:, :k], self.uniforms[:, k:]
        return dealt.reshape(-1, *shape)


def _rotation(vector):
    """Rotation matrices (B, 3, 3) from vectors (B, 3) in degrees: Cayley's form, a true rotation for any size."""
    half = (vector @ CROSS * (np.pi / 360)).reshape(-1, 3, 3)
    return np.linalg.solve(np.eye(3) - half, np.eye(3) + half)


def _heart(draw, kind, stage, severity):
    """Beats of B patients: amplitudes (B, 16, 8) in mV and their clocks (B, 4): PR shift (ms), QRS and QT stretch, QRS shift."""
    names = np.array(SYNTHETIC_TYPES)
    infarct = np.isin(kind, range(1, 1 + len(MI_TYPES)))
    table = lambda rows, width: np.array([rows.get(n, (0,) * width) for n in names], float)[kind]
    gain_qrs, gain_t, axis, qrs_width, lateral_st, lateral_t = table(REMODELLING, 6).T

    # The patient: size of the waves, electrical axes, shape beyond the dipole, where the electrodes sit.
    size = draw.normal(3)                                                                                  # (B, 3)
    g_qrs = gain_qrs * np.exp(GAIN_SPREAD[0] * size[:, 0])
    g_t = gain_t * np.exp(GAIN_SPREAD[1] * size[:, 0] + GAIN_SPREAD[2] * size[:, 1])
    g_p = np.exp(GAIN_SPREAD[3] * size[:, 2])
    gain = np.repeat(np.stack([g_p, g_qrs, g_t], 1), (2, 8, 6), axis=1)[..., None]
    form = np.array([list(BEATS).index(name) if name in BEATS else 0 for name in SYNTHETIC_TYPES])[kind]
    beat = AMPLITUDE[form]                                                                                 # (B, 16, 8)
    dipole = beat @ TO_DIPOLE
    rest = gain * (beat - dipole @ DOWER.T)
    dipole = dipole * gain * (1 + BUMP_SPREAD * draw.normal(16, 1))
    for family, spread in zip((P, QRS, STT), AXIS_SPREAD):
        turn = draw.normal(3) * spread
        if family is QRS:
            turn = turn + axis[:, None] * (0, 0, 1)
        dipole[:, family] = dipole[:, family] @ _rotation(turn).transpose(0, 2, 1)
    rest[:, QRS] += g_qrs[:, None, None] * (SHAPES.T @ (draw.normal(3, 8) * SHAPE_SPREAD))
    rest[:, STT] += g_t[:, None, None] * T_WAVE[:, None] * draw.normal(1, 8) * SHAPE_SPREAD * .5
    dipole[:, STT] += ST_PLATEAU[:, None] * draw.normal(1, 3) * ST_SPREAD
    lead_vectors = DOWER * (1 + .10 * draw.normal(8, 3)) + .03 * draw.normal(8, 3)                         # (B, 8, 3)

    # The infarct: T fades, injury pulls ST and T towards the wall, the scar takes its forces out of the QRS.
    low, high = np.array(list(STAGES.values())).transpose(2, 0, 1)[:, stage]                               # (B, 5) each
    low, high = low * infarct[:, None], np.where(infarct[:, None], high, (0, 0, 0, 0, 1))
    st, t, lost, faded, strain = ((low + (high - low) * draw.uniform(5)) * severity[:, None]).T
    kept = (1 - np.clip(faded, 0, .95))[:, None, None]
    dipole[:, STT] *= kept
    rest[:, STT] *= kept
    direction = DIRECTION @ _rotation(8 * draw.normal(3)).transpose(0, 2, 1)                               # (B, 6, 3)
    varied = 1 + .2 * draw.normal(6)
    injury, scar = varied * table(INJURY, 6), varied * table(SCAR, 6)
    early_t = np.where(t[:, None] > 0, [w[3] for w in WALLS.values()], 1.)
    pull_st = (injury[:, None] @ direction) * (st * g_qrs)[:, None, None]                                  # (B, 1, 3)
    pull_t = ((injury * early_t)[:, None] @ direction) * (t * g_t)[:, None, None]
    dipole[:, STT] += ST_PLATEAU[:, None] * pull_st + T_WAVE[:, None] * pull_t
    dipole[:, QRS] -= (LOST.T * (scar * (lost * g_qrs)[:, None])[:, None]) @ direction
    beyond = np.array([BEYOND.get(name, np.zeros((3, 8))) for name in names])[kind] / 100                  # (B, 3, 8)
    rest[:, QRS] += SHAPES.T @ (beyond * (lost * g_qrs)[:, None, None])

    # Strained, ischaemic and old hearts lose ST and T on the left side, infarct or not.
    loss = ST_PLATEAU * (strain * lateral_st)[:, None] + T_WAVE * (strain * lateral_t)[:, None]            # (B, 6)
    dipole[:, STT] -= loss[:, :, None] * LATERAL

    pr, wide, qt = draw.normal(3).T
    clocks = np.stack([14 * pr, np.exp(.09 * wide - .06) * qrs_width, np.exp(.06 * qt), QRS_LATER[form]], 1)
    return (dipole @ lead_vectors.transpose(0, 2, 1) + rest).astype(np.float32), clocks, strain


def _rhythm(draw, rate, seconds):
    """R times (B, beats) in seconds, from before 0 to after the end, and each patient's breathing (B, 2): rad/s, phase."""
    beats = int(seconds / SHORTEST_RR) + 3
    breath_hz, phase = .18 + .14 * draw.uniform(1), 2 * np.pi * draw.uniform(3)
    spread = .025 * np.exp(.6 * draw.normal(1))
    start = draw.uniform(1)
    mean = 60 / rate[:, None]
    clock = np.arange(beats) * mean
    wave = np.sin(2 * np.pi * .1 * clock + phase[:, :1]) + np.sin(2 * np.pi * breath_hz * clock + phase[:, 1:2])
    rr = np.maximum(mean * np.clip(1 + spread * (wave + .5 * draw.normal(beats)), .6, 1.5), SHORTEST_RR)
    return np.cumsum(rr, 1) - rr[:, :1] * (1 + start), np.concatenate([2 * np.pi * breath_hz, phase[:, 2:]], 1)


def _beats(r_times, t, clocks, breathing, amplitudes):
    """One record without noise, (columns, T) mV: P keeps time with the next R, QRS with the nearest, ST and T with the last."""
    beat = np.repeat(np.arange(len(r_times) - 1), np.diff(np.searchsorted(t, r_times)))                    # (T,)
    since, until = ((1000 * (t - r_times[beat + k])).astype(np.float32) for k in (0, 1))                   # ms
    qt = (.9 / np.diff(r_times)) ** (1 / 3)                                                 # Fridericia's rule
    pr, qrs_stretch, qt_stretch, qrs_shift = clocks.astype(np.float32)
    u = np.empty((len(BUMPS), len(t)), np.float32)
    for family, ms in ((P, until - pr), (QRS, np.where(since < -until, since, until) / qrs_stretch - qrs_shift),
                       (STT, since * (qt.astype(np.float32) / qt_stretch)[beat])):
        np.subtract(ms, CENTRE32[family], out=u[family])
    u *= SHARPNESS32
    u *= u
    u *= np.float32(-.5)
    np.exp(np.maximum(u, -30, out=u), out=u)                                                # far from a bump: no denormals
    u *= 1 + np.float32(.04) * np.sin((breathing[0] * t + breathing[1]).astype(np.float32)) # breathing: size of the waves
    return (amplitudes.T[:, None] @ u)[:, 0]                                                # row by row: see _electrode_noise


@functools.lru_cache(2)
def _tones(samples, rate):
    phase = 2 * np.pi * TONES_HZ[:, None] * np.arange(samples) / rate
    return np.concatenate([np.sin(phase), np.cos(phase)]).astype(np.float32)                               # (20, T)


def _noise_settings(draw):
    """What disturbs each of the nine electrodes RA, LA, LL, V1..V6 of B records (mV)."""
    wander = .032 * np.exp(.75 * draw.normal(1) + .35 * draw.normal(9)) * WANDER_GAIN                      # (B, 9)
    chance = draw.uniform(4)
    hum = np.where(chance[:, :1] < .12, .012 * np.exp(.6 * draw.normal(9)), .0015)
    mains = np.where(chance[:, 1:2, None] < .6, (1., 0.), (0., 1.))                                        # 50 or 60 Hz
    level = np.concatenate([wander[..., None] * .5 * (TONES_HZ[:8] / .05) ** -.5, hum[..., None] * mains], 2)
    tones = np.concatenate([level, level], 2) * draw.normal(9, 20)                                         # (B, 9, 20)
    muscle = .009 * np.exp(.4 * draw.normal(1) + .25 * draw.normal(9)) * np.repeat([.7, 1.25], (3, 6))
    burst = np.concatenate([(chance[:, 2:3] < .06) * (1 + 4 * draw.uniform(1)), draw.uniform(1), .2 + draw.uniform(1)], 1)
    slip = np.concatenate([(chance[:, 3:] < .04) * .4 * draw.normal(1), draw.uniform(1), np.floor(9 * draw.uniform(1))], 1)
    return tones.astype(np.float32), muscle.astype(np.float32)[..., None], burst, slip


def _electrode_noise(generator, t, electrodes, tones, muscle, burst, slip, rate):
    """Potentials (electrodes, T) in mV that do not come from the heart: wander and mains, muscle, a slipping electrode."""
    noise = generator.standard_normal((electrodes, len(t)), np.float32)
    noise[:, 1:] += noise[:, :-1] * np.float32(.5)                # skin and filters pass less at high frequencies
    noise *= muscle[:electrodes]
    if burst[0]:
        noise *= (1 + burst[0] * np.exp(-.5 * ((t - burst[1] * t[-1]) / burst[2]) ** 2)).astype(np.float32)
    noise += (tones[:electrodes, None] @ _tones(len(t), rate))[:, 0]   # row by row: a product's last bit depends on its shape
    if slip[0] and slip[2] < electrodes:
        after = t - slip[1] * t[-1]
        noise[int(slip[2])] += (slip[0] * (after > 0) * np.exp(-np.maximum(after, 0) / .6)).astype(np.float32)
    return noise


def _decimate(x, step):
    """Every `step`-th sample of (L, T) after a low-pass at 0.42 of the new rate: nothing folds down from above."""
    taps = np.arange(-8 * step, 8 * step + 1) / step
    taps = np.sinc(.84 * taps) * np.cos(np.pi * taps / 17) ** 2
    taps = (taps / taps.sum()).astype(np.float32)
    padded = np.pad(x, ((0, 0), (8 * step, 8 * step)), mode="edge")
    return sum(tap * padded[:, k:k + x.shape[1]:step] for k, tap in enumerate(taps))


def _per_record(name, values, n, choices=None, low=None, high=None):
    """(n,) numbers from one value or one for each record; names become their place among the choices."""
    values = np.asarray(values)
    if values.ndim > 1 or values.ndim == 1 and len(values) != n:
        raise ValueError(f"{name} has shape {values.shape}: give one value or one for each of the {n} records")
    for value in np.unique(values):
        if choices and value not in choices:
            raise ValueError(f"{name}={str(value)!r} is unknown: choose from {', '.join(choices)}")
        if not choices and not low <= value <= high:
            raise ValueError(f"{name}={value} is out of range: choose from {low} to {high}")
    if choices:
        values = np.array([choices.index(value) for value in values.flat], int).reshape(values.shape)
    return np.broadcast_to(values, (n,))


def synthesize(n: int, seed: int = 0, *, first: int = 0, types=None, stage=None, severity=None, sample_rate_hz: float = 500,
               seconds: float = 10., noise: float = 1., heart_rate=None, leads: str | Sequence[str] = LEADS, details: bool = False):
    """Synthetic ECG of n patients: (x (n, len(leads), T) float32 in mV, y (n, 44) uint8 in STATEMENTS' columns).

    Record first + i depends on (seed, first + i) and the settings only, not on n, the order or the process. types (NORM,
    one of MI_TYPES or ABNORMAL), stage (hyperacute, acute, subacute, old), severity (0 none, 1 typical, 2 at most) and
    heart_rate (per minute) are one value for all, one per record, or None: drawn. noise 0 is clean, 1 as in PTB-XL.
    leads=() gives the labels alone. details=True adds a dict of what was drawn: type, stage, severity, heart_rate and r_times (seconds) of each record.
    Raises ValueError naming the argument, its value and what is allowed.
    """
    for name, value, low, high in (("n", n, 0, 10 ** 9), ("seed", seed, 0, np.inf), ("first", first, 0, np.inf), ("noise", noise, 0, 10),
                                   ("sample_rate_hz", sample_rate_hz, 50, 2000), ("seconds", seconds, 1, 3600)):
        if not low <= value <= high:
            raise ValueError(f"{name}={value} is out of range: choose from {low} to {high}")
    leads = lead_names(leads)
    if not set(leads) <= set(LEADS):
        raise ValueError(f"leads={leads!r}: choose from {', '.join(LEADS)}")
    kinds = None if types is None else _per_record("types", types, n, SYNTHETIC_TYPES)
    stages = None if stage is None else _per_record("stage", stage, n, tuple(STAGES))
    severities = None if severity is None else _per_record("severity", severity, n, low=0, high=2)
    rates = None if heart_rate is None else _per_record("heart_rate", heart_rate, n, low=20, high=220)

    step = int(np.ceil(500 / sample_rate_hz))                     # slower records are decimated from at least 500 Hz
    samples, rate = int(round(seconds * sample_rate_hz)), sample_rate_hz * step
    t = np.arange(samples * step) / rate
    sources = set(leads) | ({"I", "II"} if set(leads) & set(DERIVED) else set())
    columns = [k for k, lead in enumerate(INDEPENDENT) if lead in sources]
    electrodes = 2 if columns == [0] else max(columns, default=0) + 2  # their noise is drawn in order: fewer leads, a prefix
    x, y = np.empty((n, len(leads), samples), np.float32), np.zeros((n, len(STATEMENTS)), np.uint8)
    drawn = {"type": [], "stage": [], "severity": [], "heart_rate": [], "r_times": []}
    for begin in range(0, n, 32):                                 # blocks keep the working set in the cache
        block = slice(begin, min(begin + 32, n))
        generators = [np.random.Generator(np.random.SFC64([seed, first + i])) for i in range(block.start, block.stop)]
        draw = _Draws(generators, normals=400 + int(seconds / SHORTEST_RR), uniforms=40)
        # Drawn even where given, so that the same patient can be seen with another infarct, stage or rate.
        u, pace = draw.uniform(3), np.exp(.165 * draw.normal(1)[:, 0])
        kind = np.searchsorted(np.cumsum(TYPE_SHARES)[:-1], u[:, 0], "right") if kinds is None else kinds[block]
        which = np.searchsorted(np.cumsum(STAGE_SHARES)[:-1], u[:, 1], "right") if stages is None else stages[block]
        strength = .4 + .7 * u[:, 2] if severities is None else severities[block]
        hr = np.where(kind == 0, 67, 72) * pace if rates is None else rates[block] * 1.
        amplitudes, clocks, strain = _heart(draw, kind, which, strength)
        disturbances = _noise_settings(draw)
        r_times, breathing = _rhythm(draw, hr, seconds)
        for i, generator in enumerate(generators):
            name = SYNTHETIC_TYPES[kind[i]]
            y[begin + i, STATEMENTS.index(name)] = 1
            if name == "LVH" and strain[i] > .28:                 # three of five in PTB-XL: the reader adds ischaemia
                y[begin + i, STATEMENTS.index("ISC_")] = 1
            inside = r_times[i][(r_times[i] >= 0) & (r_times[i] < seconds)]
            age = tuple(STAGES)[which[i]] if name in MI_TYPES else None
            for key, value in zip(drawn, (name, age, float(strength[i]), float(hr[i]), inside)):
                drawn[key].append(value)
            if not leads:                                         # the labels alone
                continue
            signal = _beats(r_times[i], t, clocks[i], breathing[i], amplitudes[i][:, columns])             # (columns, T)
            if noise:
                e = _electrode_noise(generator, t, electrodes, *(d[i] for d in disturbances), rate)
                e *= np.float32(noise)
                chest = e[:3].mean(0) if electrodes > 3 else 0    # Wilson's central terminal
                for row, column in zip(signal, columns):
                    row += e[column + 1] - (e[0] if column < 2 else chest)
            if step > 1:
                signal = _decimate(signal, step)
            signal *= np.float32(1000)
            np.rint(signal, out=signal)                           # 1 uV steps, as PTB-XL
            signal *= np.float32(.001)
            mv = {INDEPENDENT[column]: row for row, column in zip(signal, columns)}
            for k, lead in enumerate(leads):                      # halves are exact: the laws hold to the last bit
                x[begin + i, k] = mv[lead] if lead in mv else DERIVED[lead][0] * mv["I"] + DERIVED[lead][1] * mv["II"]
    return (x, y, drawn) if details else (x, y)


def ecg_paper(wide: float, tall: float, below: float = 0):
    """A figure of that size in mm, `below` of it left free, and its axes in mm with the grid of ECG paper; the first row's zero is at y = 0."""
    figure = need("matplotlib.figure", "drawing").Figure((wide / 25.4, (tall + below) / 25.4))  # no pyplot: the caller's backend and figures stay
    share = below / (tall + below)
    axes = figure.add_axes((0, share, 1, 1 - share), xlim=(-5, wide - 5), ylim=(-tall + 30, 30))
    axes.axis("off")
    for step, width in ((1, .25), (5, .6)):
        axes.vlines(np.arange(0, wide - 9.9, step), -tall + 35, 20, colors="#f0b4b4", linewidths=width)
        axes.hlines(np.arange(-tall + 35, 20.1, step), 0, wide - 10, colors="#f0b4b4", linewidths=width)
    return figure, axes


def plot_ecg(ecg: np.ndarray, path: str | os.PathLike, *, sample_rate_hz: float = 500, title: str = "") -> None:
    """The usual chart of a 12-lead record (12, T) in mV: 25 mm/s, 10 mm/mV, 3 x 4 leads and a rhythm strip of II."""
    ecg = np.asarray(ecg, float)
    if ecg.ndim != 2 or len(ecg) != 12 or not 1 <= ecg.shape[1] / sample_rate_hz:
        raise ValueError(f"ecg has shape {ecg.shape}: plot_ecg draws (12, T) in mV, one second or longer")
    ecg = ecg[:, :int(10 * sample_rate_hz)]
    seconds = ecg.shape[1] / sample_rate_hz
    wide, tall = 25 * seconds + 10, 140                           # mm: paper in true size
    figure, axes = ecg_paper(wide, tall)
    mm = 25 * np.arange(ecg.shape[1]) / sample_rate_hz

    def trace(lead, row, start, stop):
        axes.plot(mm[start:stop], 10 * ecg[lead, start:stop] - 30 * row, "k", linewidth=.8)
        axes.text(mm[start] + 1, 9 - 30 * row, LEADS[lead], fontsize=8, weight="bold")

    edges = np.linspace(0, ecg.shape[1], 5).astype(int)
    for lead in range(12):
        trace(lead, lead % 3, *edges[lead // 3:lead // 3 + 2])
    trace(1, 3, 0, ecg.shape[1])
    axes.text(0, 23, f"{title}   25 mm/s, 10 mm/mV".strip(), fontsize=9)
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------------------
# Detection: from somebody's own recording to probabilities
# ----------------------------------------------------------------------------------------------------------------------


class Answer(nn.Module):
    """Encoder, head and temperature as one network: (B, L, T) -> (B, 9) calibrated probabilities of MI_TYPES.

    zscore=False takes what `preprocess` returns, zscore=True 10 s in mV, which is what is exported.
    """

    def __init__(self, encoder: ResNet1D, content: dict, zscore: bool = False):
        super().__init__()
        columns = [content["classes"].index(t) for t in MI_TYPES]
        self.encoder, self.lead, self.temperature, self.zscore = encoder, content["lead"], content["temperature"], zscore
        self.register_buffer("weight", content["head"][0][columns])
        self.register_buffer("bias", content["head"][1][columns])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.zscore:
            x = x - x.mean((1, 2), keepdim=True)
            x = x / x.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)
        z = self.encoder(with_empty_leads(x, self.encoder, self.lead))
        return torch.sigmoid(F.linear(z, self.weight, self.bias) / self.temperature)


class Detector:
    """Probabilities of the nine infarct types in a recording; `load_detector` makes it.

    detector(ecg, sample_rate_hz): ecg in mV, one recording (T,) or (L, T), or several of one length (N, L, T), at any rate
    -> {type: probability}, floats or arrays (N,).  L is 1, or 12 for a probe of all leads.  More than 10 s are covered by
    windows of 10 s, spread evenly (they overlap where the length is no multiple), and their probabilities averaged, flat
    windows left out; 2.5 to 10 s are padded as in `preprocess`.  ValueError: another shape, too short, flat throughout.

    Attributes: leads, sample_rate_hz, preprocessing; points {name: {type: (threshold, sensitivity, specificity)}} on the
    validation fold, the threshold NaN where the type has fewer than 10 cases there or sensitivity + specificity is below 1.1,
    where a guess has 1; positives {type: how many cases the validation fold has}; content, the whole checkpoint.
    """

    def __init__(self, path: str | os.PathLike):
        content = self.content = read_checkpoint(path)
        if "temperature" not in content:
            raise ValueError(f"{path}: no calibrated head in it; give a probe.pt of train_probe.py (of an old version: probe again)")
        encoder = stored_encoder(content, path)
        self.leads = LEADS if encoder.lead == "all" else (encoder.lead,)
        self.sample_rate_hz, self.preprocessing = encoder.sample_rate_hz, encoder.preprocessing
        self.answer = Answer(encoder, content).eval()
        column = {t: content["classes"].index(t) for t in MI_TYPES}
        self.positives = {t: int(content["positives"][column[t]]) for t in MI_TYPES}
        self.points = {name: {t: tuple(point[column[t]].tolist()) for t in MI_TYPES} for name, point in content["points"].items()}
        for point in self.points.values():
            useless = [t for t, (_, a, b) in point.items() if not a + b >= 1.1 or self.positives[t] < 10]
            point.update({t: (math.nan, *point[t][1:]) for t in useless})

    @torch.no_grad()
    def __call__(self, ecg: np.typing.ArrayLike, sample_rate_hz: float) -> dict:
        ecg, L = np.asarray(ecg, np.float64), len(self.leads)
        batch = ecg.reshape((1,) * (3 - ecg.ndim) + ecg.shape) if 1 <= ecg.ndim <= 3 else ecg
        if batch.ndim != 3 or batch.shape[1] != L:
            raise ValueError(f"a recording of shape {ecg.shape}: expected ({L}, samples){', or (samples,)' * (L == 1)}; several as (recordings, {L}, samples)")
        width, ratio, mean = round(10 * self.sample_rate_hz), sample_rate_hz / self.sample_rate_hz, []
        for raw in map(fill, batch):
            one = resample(raw, sample_rate_hz, self.sample_rate_hz)
            T = one.shape[1]
            starts = np.linspace(0, max(0, T - width), max(1, math.ceil(T / width - 0.01))).round().astype(int)
            # Flat as recorded: beside an ECG the filter of the new rate leaves a little of it.
            starts = [start for start in starts if np.ptp(raw[:, round(start * ratio) : round((start + width) * ratio)], axis=1).any()]
            if not starts:
                raise ValueError("the recording is flat")
            windows = [preprocess(one[:, start:][:, :width], sample_rate_hz=self.sample_rate_hz, **self.preprocessing) for start in starts]
            parts = torch.from_numpy(np.stack(windows)).split(32)  # a recording of 24 hours has 8,640 windows
            mean.append(torch.cat([self.answer(part) for part in parts]).mean(0))
        mean = torch.stack(mean).numpy()
        return {t: mean[:, k] if ecg.ndim == 3 else float(mean[0, k]) for k, t in enumerate(MI_TYPES)}


def load_detector(path: str | os.PathLike) -> Detector:
    """The detector of a probe.pt, on the CPU."""
    return Detector(path)


# What the lines above the numbers of a text file are searched for.  The rate: a sampling rate by name, else a line that says
# nothing but a frequency.  The unit: by name, else a voltage without a number.  The lead of the only column: lines about leads.
HERTZ = r"(\d+(?:[.,]\d+)?)\s*(k?)"
SAMPLING = r"sampl\w*[\s_-]*(?:rate|fre[qk]\w*)|abtast(?:rate|freq)\w*|chantillonnage|muestreo|campionamento|amostragem|\bfs"
RATE = re.compile(rf"(?i)(?:{SAMPLING})\b[^\d\n]{{0,12}}(?<![a-z]){HERTZ}(?![\d.,]|\s*-?bit)")
OTHER_RATE = re.compile(rf"(?im)^\W*(?:(?:rate|sampl\w*|fr[eé][qc]\w*)\W+)?{HERTZ}(?:hz|hertz)\W*$")
UNIT = re.compile(r"(?i)(?<![a-z])(?:unit|einheit)\w*\W+(\w+)|(?<![a-zµμ/\d])(?<!\d )([nuµμm]v)(?![a-z/])|[(\[_](v)(?:olts?)?[)\]]")
LEAD_LINE = re.compile(r"(?im)^\W*(?:e[ck]g\W*)?(?:lead|ableit|d[ée]riva|afleid|avled|electrode).*$")
LEAD_NUMBER = re.compile(r"(?i)(?:lead|e[ck]g|ch|cm|[dl])\W*[2-9]\b")
LEAD_NAME = re.compile(r"(?i)(?<![a-z0-9-])(?:lead[\W_]*|e[ck]g[\W_]*|ml|d)?(i{1,3}|av[rlf]|v[1-6])(?![a-z0-9])")
TIME = re.compile(r"(?i)time|zeit|elapsed|stamp")
TIME_UNIT = re.compile(r"(?i)(?<![a-z])(min|[nuµμm]s)")


def read_recording(
    path: str | os.PathLike, leads: str | Sequence[str], *, sample_rate_hz: float | None = None, unit: str | None = None, column: str | None = None
) -> tuple[np.ndarray, float, list[str]]:
    """((L, T) float64 in mV, sample rate in Hz, warnings) of a WFDB record, a .npy array or a table in text.

    .npy: (T,), (L, T) or (T, L), twelve leads in the order of LEADS.  Text (.csv, .tsv, .txt): a line for each sample, above
    them any header, in which names, unit and rate are looked for; a column of times gives the rate too.  The arguments go
    before what the file says.  Where it states no unit, it is mV, and one column without a name is the lead asked for.
    What else is not clear is not guessed: ValueError names the file and the argument that helps.  Also where it is
    unreadable, lacks a lead or has no finite sample.
    """
    path, kind, leads, said, rates = str(path), os.path.splitext(path)[1].lower(), lead_names(leads), [], {"--sample-rate": sample_rate_hz}
    if kind not in (".npy", ".csv", ".tsv", ".txt"):
        ecg, rates["header"] = read_wfdb(path, leads)
        said += ["--unit and --column are ignored: a WFDB record says both"] if unit or column else []
    else:
        header, names, table = read_array(path) if kind == ".npy" else read_text(path)
        hertz = lambda stated: float(stated[1].replace(",", ".")) * (1000 if stated[2] else 1)
        stated = set(map(hertz, RATE.finditer(header))) or set(map(hertz, OTHER_RATE.finditer(header)))
        rates["header"] = stated.pop() if len(stated) == 1 else None
        times, rates["time column"], even = find_times(names, table)
        if not even:
            said.append("the times do not grow evenly (gaps, restarted): check the order of the samples and the sample rate")
        table, names = np.delete(table, times, 1), [name for i, name in enumerate(names) if i not in times]
        n, found = table.shape[1], [([""] + LEAD_NAME.findall(name))[-1].upper() for name in names]  # of two lines of names the lower
        if n == 1 and not any(found):
            above = {lead.upper() for line in LEAD_LINE.findall(header) for lead in LEAD_NAME.findall(line) or ["another"]}
            above |= {name for name in names if LEAD_NUMBER.search(name)}
            found = [", ".join(above) or leads[0].upper()]
        elif n == 12 and kind == ".npy":
            found = [lead.upper() for lead in LEADS]
        chosen = [found.index(lead.upper()) if found.count(lead.upper()) == 1 else -1 for lead in leads]
        if column is not None and len(leads) == 1:
            named = [i for i, name in enumerate(names) if name == column] or [i for i, name in enumerate(names) if name.endswith(" " + column)]
            chosen = named if len(named) == 1 else [int(column) - 1 if column.isdecimal() and not named else -1]
        if not all(0 <= c < n for c in chosen):
            remedy = "give --column NAME or its number" if len(leads) == 1 else "name the columns I, II, ..."
            there = ", ".join(filter(None, names or found)) or "without names"
            raise ValueError(f"{path}: no column for lead {', '.join(leads)} among {n} ({there}); {remedy}")
        stated = (UNIT.search(names[chosen[0]]) if names else None) or UNIT.search(header)
        unit = unit or (stated[stated.lastindex] if stated else "mV")
        if unit.lower() not in MILLIVOLTS:
            raise ValueError(f"{path}: unit {unit} is not a voltage; give --unit")
        ecg = table[:, chosen].T * MILLIVOLTS[unit.lower()]
        if not np.abs(ecg[np.isfinite(ecg)]).max(initial=-1) <= 1e9 or not np.isfinite(ecg).any():
            raise ValueError(f"{path}: no sample of lead {', '.join(leads)} is a number, or one is too large for an ECG")
    rates = {source: rates[source] for source in ("--sample-rate", "header", "time column") if rates.get(source)}
    source, rate = next(iter(rates.items()), ("", 0))
    if not 20 <= rate <= 100_000:
        reason = f"{rate:g} Hz by the {source} is no sample rate of an ECG" if rates else "its sample rate is not known"
        raise ValueError(f"{path}: {reason}; give --sample-rate")
    if any(abs(other / rate - 1) > 0.01 for other in rates.values()):
        stated = ", ".join(f"{other:g} Hz by the {source}" for source, other in rates.items())
        said.append(f"contradicting sample rates ({stated}); {rate:g} Hz is used")
    if missing := (~np.isfinite(ecg)).sum():
        said.append(f"{missing:,} of {ecg.size:,} samples are missing, and are taken as 0 mV")
    return fill(ecg), rate, said


def find_times(names: list[str], table: np.ndarray) -> tuple[list[int], float | None, bool]:
    """(columns of times and counters in a table (samples, columns), the rate in Hz by the last that has one, whether they grow evenly)."""
    grows = table.shape[1] > 1 and (np.diff(table[:, 0]) > 0).all()  # no lead does
    columns = sorted({i for i, name in enumerate(names) if TIME.search(name)} | ({0} if grows else set()))
    rate, even = None, True
    for i in columns:
        steps, unit = np.diff(table[:, i]), TIME_UNIT.search(names[i]) if names else None
        if not 0 <= steps.min() <= steps.max() < 10 * steps.mean():
            even = False
        elif unit or steps.mean() < 0.1:  # without a unit seconds, but larger steps are no seconds of an ECG: a counter
            rate = ({"min": 1 / 60, "ms": 1e3, "ns": 1e9}.get(unit[1].lower(), 1e6) if unit else 1) / steps.mean()
    return columns, rate, even


def read_array(path: str) -> tuple[str, list[str], np.ndarray]:
    """A .npy file as `read_text` returns a table, without header and names."""
    try:
        array = np.load(path, allow_pickle=False)
        table = np.atleast_2d(array.astype(np.float64, casting="same_kind"))
    except Exception as error:  # numpy raises many kinds for broken files
        raise ValueError(f"{path}: not a readable array of real numbers ({type(error).__name__})") from error
    table = table.T if len(table) in (1, 12) else table
    if table.ndim != 2 or len(table) < 2 or table.shape[1] > 64:
        raise ValueError(f"{path}: an array of shape {array.shape}: expected (samples,), (12, samples) or (samples, columns)")
    return "", [], table


def read_text(path: str) -> tuple[str, list[str], np.ndarray]:
    """(header, names of the columns of numbers, those columns (samples, columns) float64) of a table in text.

    Cells are separated by tab, semicolon, comma or blanks.  A comma is a decimal comma where there are other separators, and in
    quotes.  "12,345" in all lines is one number if one has a 0 after the comma, with which no whole number begins; else two
    if the first grows, as a time does, or if much follows the comma.  Columns of words are left out; other cells are NaN.
    """
    pandas = need("pandas", "reading a table in text")
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if "\0" in text[:4096]:
        raise ValueError(f"{path}: binary, so not a recording as text")
    text = text.replace("\u2212", "-")  # the minus of some locales
    text = re.sub(r"(?i)\b(micro|milli|) ?volts?\b", lambda unit: {"micro": "uV", "milli": "mV", "": "V"}[unit[1].lower()], text)
    lines = re.sub("[\"']", "", re.sub(r'"([+-]?\d+),(\d+)"', r"\1.\2", text)).splitlines()
    number = re.compile(r"(?i)(?!.*hz)\s*[+-]?[.,]?\d").match
    start = next((i for i in range(len(lines) - 1) if number(lines[i]) and number(lines[i + 1])), len(lines))
    header, lines = [line for line in lines[:start] if line.strip(" \t,;")], lines[start:]
    first = lines[0].strip() if lines else ""
    separator = next((mark for mark in "\t;" if mark in first), "," if "," in first else r"\s+")
    filled = [line.strip() for line in lines if re.search(r"\d", line)]
    if separator == "," and re.search(r"[^,\s]\s+[-+]?\d*,\d+$", first):
        separator = r"\s+"
    elif separator == "," and all(map(re.compile(r"[+-]?\d+(,\d+(e[+-]?\d+)?)?", re.I).fullmatch, filled)):
        before, _, behind = zip(*(line.partition(",") for line in filled))
        behind, before = {digits for digits in behind if len(digits) > 1}, np.array(before, float)
        grows = (np.diff(before) >= 0).all() and before[0] < before[-1]
        if any(digits[0] == "0" for digits in behind) or not grows and len(behind) < 30:
            separator = ";"
    body = "\n".join(lines).rstrip()
    body = body if separator == "," else body.replace(",", ".")
    try:
        cells = pandas.read_csv(io.StringIO(body), sep=separator, header=None, skipinitialspace=True, skip_blank_lines=False, low_memory=False)
    except ValueError as error:  # pandas counts lines from the first of numbers
        raise ValueError(f"{path}: no table of numbers with a line for each sample from line {start + 1} on ({' '.join(str(error).split())})") from error
    cells = cells.apply(pandas.to_numeric, errors="coerce")
    kept = [i for i in cells if cells[i].count() > len(cells) / 2]
    if not kept:
        raise ValueError(f"{path}: no column of numbers in it; a line for each sample is expected")
    titles = [row for row in (re.split(separator, line.strip("# ")) for line in header[-2:]) if len(row) == cells.shape[1]]
    names = [" ".join(part.strip() for part in parts) for parts in zip(*titles)]
    return "\n".join(header), [names[i] for i in kept] if names else [], cells[kept].to_numpy(np.float64)


def check_recording(ecg: np.ndarray, sample_rate_hz: float, leads: Sequence[str]) -> list[str]:
    """What looks wrong with a recording (L, T) in mV, a sentence each.  Limits are from PTB-XL, folds 1-8, at 100 Hz."""
    medfilt = need("scipy.signal", "checking a recording").medfilt
    said, skewness = [], lambda v: (v**3).mean() / max(1e-12, (v**2).mean()) ** 1.5
    smooth = lambda v, width: np.convolve(v, np.ones(width) / width, "same")
    for lead, x in zip(leads, ecg):
        low, high = np.quantile(x, [0.005, 0.995])
        still = np.diff(np.flatnonzero(np.diff(x, prepend=np.nan, append=np.nan))).max() / sample_rate_hz
        if still >= 1:
            said.append(f"lead {lead} does not change for {still:.1f} s: an electrode may be off")
        elif (x == x.max()).mean() + (x == x.min()).mean() > 0.02:
            said.append(f"lead {lead} is cut off at {x.min():.2f} or {x.max():.2f} mV: the amplifier was saturated")
        if high - low > 10 or 0 < high - low < 0.05:
            remedy = "are these microvolts? give --unit uV" if high > low + 10 else "is the unit right? give --unit"
            said.append(f"lead {lead} spans {high - low:.3g} mV: {remedy}")
        if (peak := np.abs(x - np.median(x)).max()) > 5 * (high - low) > 0:
            said.append(f"lead {lead} has a spike of {peak:.3g} mV: is that a mark or a missing sample? remove it")
        fast = x - smooth(x, 2 * round(0.025 * sample_rate_hz) + 1)
        noise = 1.48 * np.median(np.abs(fast))  # of a beat only the QRS complex is as fast, and that is too short to count
        if high > low and noise > 0.08 * (high - low):
            said.append(f"lead {lead} is noisy: {1000 * noise:.0f} uV of noise in {high - low:.2f} mV")
        if lead == "I" and len(x) > sample_rate_hz:
            beat = resample(x[None], sample_rate_hz, 100)[0]
            beat = beat - medfilt(beat, 61)
            slow = smooth(beat, 9)  # P and T waves; the rest is the QRS complex
            if skewness(beat - slow) + skewness(slow) / 2 < 0:
                said.append("lead I points down: the arm electrodes may be swapped, or a watch worn on the other wrist")
    return said


def draw_detection(path: str | os.PathLike, ecg: np.ndarray, sample_rate_hz: float, title: str, answer: dict, points: dict, point: str) -> None:
    """Up to 30 s of one lead (T,) in mV on ECG paper, and below it the probabilities as bars, red from their thresholds on."""
    width = int(10 * sample_rate_hz)
    rows = min(3, -(-len(ecg) // width))
    tall, shown = 40 + 30 * rows, f"first {rows * 10} of {len(ecg) / sample_rate_hz:.0f} s, " if len(ecg) > rows * width else ""
    figure, axes = ecg_paper(260, tall, below=66)
    for row in range(rows):
        part = ecg[row * width : (row + 1) * width]
        axes.plot(25 * np.arange(len(part)) / sample_rate_hz, np.clip(10 * (part - np.median(ecg)), -14, 19) - 30 * row, "k", linewidth=0.8)
    axes.text(0, 23, f"{title}   {shown}25 mm/s, 10 mm/mV   research code, not a medical device".replace("$", r"\$"), fontsize=9)
    probabilities, thresholds = list(answer.values()), [points[t][0] for t in answer]
    right = max(0.1, 1.1 * np.nanmax(probabilities + thresholds))
    bars = figure.add_axes((0.1, 14 / (tall + 66), 0.86, 48 / (tall + 66)), xlabel="probability", xlim=(0, right))
    bars.barh(list(answer), probabilities, color=["#c0392b" if p >= threshold else "#7f8c8d" for p, threshold in zip(probabilities, thresholds)])
    bars.plot(thresholds, list(answer), "k|", markersize=12, label=f"threshold ({point})")
    bars.invert_yaxis()
    bars.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=110)


def nan_to_none(content):
    """JSON has no NaN."""
    if isinstance(content, dict):
        return {key: nan_to_none(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [nan_to_none(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def export_detector(path: str | os.PathLike, out: str | os.PathLike) -> str:
    """A detector as OUT.onnx or OUT.pt2, and a line that says what it takes and gives: mV at its own rate -> probabilities."""
    detector, out = load_detector(path), Path(out)
    if detector.preprocessing["filter"] != "none":
        raise ValueError(f"{path}: --filter {detector.preprocessing['filter']} cannot be exported, it is not a part of the network")
    if not out.absolute().parent.is_dir() or out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{out}: export writes .onnx or .pt2, into a folder that is there")
    network = Answer(detector.answer.encoder, detector.content, zscore=detector.preprocessing["normalize"] == "zscore").eval()
    example = (torch.zeros(2, len(detector.leads), round(10 * detector.sample_rate_hz)),)
    said = dict(types=" ".join(MI_TYPES), thresholds=json.dumps(nan_to_none(detector.points)), leads=" ".join(detector.leads))
    said |= dict(sample_rate_hz=f"{detector.sample_rate_hz:g}", unit="mV", seconds="10")
    missing = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if out.suffix == ".onnx" and missing:
        raise ImportError(f"writing ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}, or export to .pt2")
    program = torch.export.export(network, example, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    if out.suffix == ".pt2":
        torch.export.save(program, out, extra_files={"about.json": json.dumps(said)})
    else:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it speaks of packages that are not needed here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its own use of its own parts
            model = torch.onnx.export(program, dynamo=True, input_names=["ecg"], output_names=["probability"], verbose=False)
        model.model.metadata_props.update(said)
        model.save(out)
    return f"{out}: input ecg (batch, {', '.join(map(str, example[0].shape[1:]))}) in mV, output probability (batch, 9) of {', '.join(MI_TYPES)}"


def describe_checkpoint(path: str | os.PathLike) -> str:
    """A checkpoint of any kind as a model card."""
    content = read_checkpoint(path)
    if "architecture" not in content:
        return f"{path}\nnot written by selfmis; top level: {', '.join(map(str, content))}"
    config, encoder = content.get("config", {}), stored_encoder(content, path)

    def seen(entries: list[dict]) -> str:
        folds = lambda e: " ".join(map(str, e.get("folds", "?")))
        how = lambda e: "chosen by " if e.get("use") == "validation" else ""
        said = [f"{how(e)}{e['data']}, {e.get('records', 'unknown')} records with{'' if e['labels'] else 'out'} labels, folds {folds(e)}" for e in entries]
        return "; ".join(said) or "nothing"

    shown = lambda c, key: "absent" if c[key] is None or c[key] != c[key] else f"{c[key]:.3f} ({c['low']:.3f} to {c['high']:.3f})"
    made = f"written {content.get('date', 'at an unknown time')} with torch {content.get('torch', '?')}, git {content.get('git') or '?'}"
    lines = [
        f"{path}: {content.get('kind', 'encoder')}, {made}",
        f"encoder: {sum(p.numel() for p in encoder.parameters()):,} parameters, {encoder.leads} lead(s) -> {encoder.embedding_dim} dimensions",
        f"input: lead {content['lead']} at {content['sample_rate_hz']:g} Hz, {', '.join(f'{k} {v}' for k, v in (content['preprocessing'] or {}).items())}",
        f"trained on, its teacher included: {seen(content['seen'])}",
    ]
    if "classes" in content:
        lines.append(f"head: {len(content['classes'])} statements; its labels: {seen(content.get('head_seen', content['seen']))}")
    if "results" in content:
        means = (f"{group} {shown(content['results'][group], 'mean')}" for group in ("nine", "six", "diagnostic"))
        lines.append(f"AUC on fold {config['test_fold']}, 95 % interval: {', '.join(means)}")
        lines += [f"  {t:<6}{c['positives']:>5} positives  {shown(c, 'auc')}" for t, c in content["results"]["types"].items()]
    for name in ("reliability", "metrics"):
        if name in content:
            lines.append(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in content[name].items()))
    lines.append("settings: " + ", ".join(f"{name} {value}" for name, value in config.items() if value not in (None, False, [], "")))
    lines.append("limits: research code, not a medical device; one lead does not show every infarct, and no other devices than its training data's were tested")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing of the two scripts: flags, processes, a run's folder, the pass that reads every record once
# ----------------------------------------------------------------------------------------------------------------------


def flag(default, help: str, **options):
    """A field of a settings dataclass that is also a command-line flag; `options` go to argparse."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(metadata={"help": help, **options}, **factory)


@dataclasses.dataclass
class Config:
    """Settings that both scripts share.  None means: follows from the data or the checkpoint, and is printed."""

    given = ()  # names of the flags that were typed; no field, so no flag
    data: list[str] = flag(
        [], "folder of PTB-XL, MIMIC-IV-ECG or any WFDB records, or synthetic:N; repeat it to mix (default: synthetic ECG)", action="append", type=str, metavar="ROOT"
    )
    limit: int | None = flag(None, "use the first N records of each collection only", type=int, metavar="N")
    out: str = flag("", "folder of the run", metavar="DIR")
    lead: str | None = flag(None, "the single lead, or all: twelve (default: the checkpoint's, else I)")
    size: str | None = flag(None, "encoder made at random (default: the checkpoint's, else ecgfounder)", choices=tuple(SIZES))
    sample_rate: float | None = flag(None, "sample rate in Hz (default: the checkpoint's, else 500)", type=float)
    normalize: str | None = flag(None, "(default: the checkpoint's, else zscore)", choices=("zscore", "none"))
    filter: str | None = flag(None, "(default: the checkpoint's, else none)", choices=("none", "ecgfounder"))
    val_fold: int = flag(9, "PTB-XL and synthetic fold on which the best epoch is chosen", type=int)
    test_fold: int = flag(10, "PTB-XL and synthetic fold for the final number; pre-training never reads it", type=int)
    epochs: int = flag(20, "passes over the training records", type=int)
    batch_size: int = flag(0, "records in a batch of one process", type=int)
    lr: float = flag(0.0, "peak learning rate, cosine to 0", type=float)
    amp: str = flag("auto", "mixed precision of the training; auto: bf16 on a GPU that has it, fp16 on others, off without", choices=("auto", "bf16", "fp16", "off"))
    workers: int | None = flag(None, "processes that read records (default: the cores, shared out)", type=int)
    cache: str | None = flag(None, "folder for signals and teacher embeddings, or none (default: `cache` beside OUT)", metavar="DIR")
    seed: int = flag(0, "seed of weights and order", type=int)
    resume: bool = flag(False, "go on from OUT/last.pt")
    overwrite: bool = flag(False, "replace the run in OUT")
    strict: bool = flag(False, "stop at the first unusable record instead of leaving it out")
    debug: bool = flag(False, "show the traceback of an error")
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    compile: bool = flag(False, "torch.compile the encoder: about twice as fast on a GPU after a minute; needs a C compiler")


def parse_flags(config_class, description: str, argv: Sequence[str] | None = None):
    """The settings of a command line; --help shows every default; abbreviations are refused."""
    import argparse

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    if int(os.environ.get("RANK", 0)):  # under torchrun the first process alone says what is wrong
        parser.print_usage = parser.print_help = lambda file=None: None
        parser.error = lambda message: (time.sleep(1), sys.exit(2))
    for field in dataclasses.fields(config_class):
        options = dict(field.metadata)
        if isinstance(field.default, bool):
            options["action"] = "store_true"
        elif field.default not in (None, dataclasses.MISSING):
            options["help"] += f" (default: {field.default})"
        options["help"] = options["help"].replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(argv))
    config = config_class(**given)
    config.given = tuple(given)  # what was typed stays, whatever else follows from it
    for name in ("limit", "epochs", "batch_size", "sample_rate", "lr", "seeds", "patience", "val_records"):
        value = getattr(config, name, None)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    for name in ("seed", "warmup", "workers"):
        if (getattr(config, name, None) or 0) < 0:
            parser.error(f"--{name} {getattr(config, name)}: expected 0 or more")
    if config.lead is not None and config.lead != "all":
        try:
            config.lead = LEADS[lead_index(config.lead)]
        except ValueError as error:
            parser.error(f"--lead: {error}")
    if config.resume and config.overwrite:
        parser.error("--resume and --overwrite: choose one")
    if not {config.val_fold, config.test_fold} <= set(range(1, 11)) or config.val_fold == config.test_fold:
        parser.error(f"--val-fold {config.val_fold} --test-fold {config.test_fold}: expected two different folds from 1 to 10")
    return config


class Ranks(NamedTuple):
    """Who this process is among all that torchrun started; one process without torchrun is rank 0 of 1."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def print(self, *text) -> None:
        if self.first:
            print(*text, flush=True)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def gather_rows(self, mine: torch.Tensor, n: int) -> torch.Tensor:
        """Rows 0, 1, ... n - 1 on every process, when this one holds rows rank, rank + world, ...: none twice, none lost."""
        if self.world == 1:
            return mine
        m = -(-n // self.world)
        padded = torch.zeros(m, *mine.shape[1:], dtype=mine.dtype, device=self.device)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, 1).flatten(0, 1)[:n].to(mine.device)

    def gather_objects(self, mine) -> list:
        if self.world == 1:
            return [mine]
        parts = [None] * self.world
        dist.all_gather_object(parts, mine)
        return parts


def join_ranks(device: str, seed: int) -> Ranks:
    """Set device and seed; under torchrun join the other processes, by nccl with GPUs and gloo without."""
    env = {name: int(os.environ.get(name.upper(), default)) for name, default in (("rank", 0), ("world_size", 1), ("local_rank", 0), ("local_world_size", 1))}
    gpus, processes = torch.cuda.device_count(), env["local_world_size"]
    if device == "auto":
        device = "cuda" if gpus >= processes and torch.cuda.is_available() else "cpu"
        if 0 < gpus < processes and not env["rank"]:
            print(f"{processes} processes but {gpus} GPU(s) on this machine: all compute on the CPU; start {gpus} to use them", flush=True)
    if device == "cuda":
        if gpus < processes:
            raise ValueError(f"--device cuda: {processes} processes on this machine need a GPU each, there are {gpus}; start fewer or give --device cpu")
        device = f"cuda:{env['local_rank']}"
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32: embeddings agree with a CPU's
    elif device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: this machine or this build of torch has no Metal device")
    elif device == "cpu" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, os.cpu_count() // processes))  # torchrun's own 1 would leave cores idle
    if env["world_size"] > 1:
        # After a restart torchrun's store still holds the addresses of the dead processes, so each attempt gets its own names.
        launch, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore("attempt-" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), launch)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(hours=12))
        ERROR_STORE.append(store)
        LAUNCH_STORE.append(launch)
    torch.manual_seed(seed)
    return Ranks(env["rank"], env["world_size"], env["local_rank"], env["local_world_size"], torch.device(device))


def run_script(main, config_class, description: str) -> None:
    """Parse, run, and turn what a user can cause into one sentence and exit code 2 (--debug shows the traceback)."""
    config = parse_flags(config_class, description)
    try:
        main(config)
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        full = isinstance(error, torch.OutOfMemoryError)
        if config.debug or (isinstance(error, RuntimeError) and not ERROR_STORE and not full):
            raise  # one process and no user error: a defect, which needs its traceback
        if claim_first_error():
            text = str(error).strip()
            if text.startswith("Caught "):  # in a process that reads: its traceback ends in what counts
                text = text.splitlines()[-1].partition(": ")[2]
            print(f"error: {text}{'; give a smaller --batch-size' if full else ''}", file=sys.stderr, flush=True)
        os._exit(2)  # at once: destructors of a broken process group may wait for the others
    except KeyboardInterrupt:
        os._exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may outlive the group, and die noisily (SIGABRT, one run in twenty) once Python is being torn down


ERROR_STORE: list[dist.Store] = []  # what the processes share even while they fail
LAUNCH_STORE: list[dist.Store] = []  # what they share with those that torchrun started before and restarted


def claim_first_error() -> bool:
    """True in the process that fails first: the others only fail because it did, or for the same reason."""
    if ERROR_STORE:
        try:
            return ERROR_STORE[0].add("errors", 1) == 1
        except RuntimeError:  # the store has gone with the process that held it
            return False
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(1)  # torchrun ends all when one ends: leave the first process time to speak
    return rank == 0


class View(NamedTuple):
    """How a record is shown to an encoder; it stands in every checkpoint."""

    lead: str  # a name of LEADS, or "all"
    sample_rate_hz: float
    preprocessing: dict  # keyword arguments of `preprocess`


def resolve(name: str, asked, known: dict[str, object], default):
    """A setting that checkpoints may fix: what the flag asks, else what they say, else the default; a conflict is an error."""
    said = {source: value for source, value in known.items() if value is not None}
    if asked is not None:
        said["--" + name] = asked
    if any(value != next(iter(said.values())) for value in said.values()):
        raise ValueError(f"{name}: " + ", ".join(f"{value} in {source}" for source, value in said.items()) + "; they must agree")
    return next(iter(said.values()), default)


def resolve_view(config, lead_of: dict[str, nn.Module], encoders: dict[str, nn.Module]) -> View:
    """Lead, rate and preprocessing from the flags and the checkpoints {path: encoder}; all that is asked must agree."""
    known = lambda name: {path: getattr(encoder, name, None) for path, encoder in encoders.items()}
    lead = resolve("lead", config.lead, {path: getattr(encoder, "lead", None) for path, encoder in lead_of.items()}, "I")
    rate = resolve("sample-rate", config.sample_rate, known("sample_rate_hz"), 500)
    settings = known("preprocessing")
    steps = {
        name: resolve(name, getattr(config, name), {path: (p or {}).get(name) for path, p in settings.items()}, default)
        for name, default in (("normalize", "zscore"), ("filter", "none"))
    }
    return View(lead, float(rate), steps)


def open_encoder(spec: str, leads: int, size: str | None) -> ResNet1D | None:
    """The encoder of an ECGFounder file or of a checkpoint of ours; None for the word random.

    Raises ValueError if it has another number of leads than `leads` (0: any) or another size than asked.
    """
    if spec == "random":
        return None
    content = read_checkpoint(spec)
    if "architecture" in content:
        encoder = stored_encoder(content, spec)
    else:
        stem = content.get("state_dict", content).get("first_conv.conv.weight")
        if stem is None:
            raise ValueError(f"{spec}: neither a checkpoint of selfmis nor an ECGFounder file (no first_conv.conv.weight)")
        encoder = load_ecgfounder(spec, stem.shape[1])
        encoder.lead, encoder.sample_rate_hz, encoder.preprocessing = "I" if encoder.leads == 1 else "all", 500, None
        encoder.seen = [{"data": "ECGFounder's own", "labels": True}]
    if leads and encoder.leads != leads:
        raise ValueError(f"{spec}: an encoder of {encoder.leads} lead(s) where one of {leads} is needed")
    same = lambda shape: all(encoder.architecture[name] == (list(value) if isinstance(value, tuple) else value) for name, value in shape.items())
    found = next((name for name, shape in SIZES.items() if same(shape)), "other")
    if size and found != size:
        raise ValueError(f"--size {size}: {spec} holds an encoder of size {found}")
    return encoder


def open_run(config, ranks: Ranks) -> Path:
    """The run's folder, refused where a run would be lost; --overwrite removes the files of a run and nothing else."""
    out, launch = Path(config.out), LAUNCH_STORE[0] if LAUNCH_STORE else None
    remembers = launch is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # it outlives the processes
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and not (remembers and not launch.check(["opened"])):
        config.resume = True  # torchrun restarted what had been let in here: go on
    files = ("config.json", "log.jsonl", "last.pt", "best.pt", "probe.pt", "results.json", "results.md", "roc.png", "predictions.npz")
    if ranks.first:
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: is a file, not a folder")
        old = [name for name in files if (out / name).exists()]
        if config.overwrite and not config.resume:
            for name in old:
                (out / name).unlink()
        elif old and not config.resume:
            raise ValueError(f"--out {out}: holds a run already ({', '.join(old)}); give another --out, or --resume or --overwrite")
        out.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    if launch is not None:
        launch.set("opened", "yes")
    return out


# Settings that may change when a run goes on: they change what is printed or how fast it is, not what is computed; `restore`
# compares the precision that --amp comes to.
FREE_ON_RESUME = ("amp", "compile", "compare", "out", "workers", "cache", "resume", "overwrite", "debug", "device", "save_seconds")


def read_last(config, out: Path, ranks: Ranks) -> dict | None:
    """OUT/last.pt for --resume, or None to start; ValueError if the run was started with other settings."""
    there = ranks.gather_objects((out / "last.pt").exists())
    if any(there) and not all(there):
        raise ValueError(f"--out {out}: some machines do not see last.pt there; give a folder that all of them share")
    if not config.resume or not there[0]:
        return None
    last = read_checkpoint(out / "last.pt")
    if "config" not in last or "world" not in last:
        raise ValueError(f"{out / 'last.pt'}: not written by a run of selfmis")
    all_records = "batch-size x processes"
    now = dataclasses.asdict(config) | {all_records: config.batch_size * ranks.world}
    then = last["config"] | {all_records: last["config"]["batch_size"] * last["world"]}
    free = FREE_ON_RESUME + (() if getattr(config, "local_negatives", False) else ("batch_size",))
    changed = [f"--{name.replace('_', '-')} {now.get(name)}, not {value}" for name, value in then.items() if name not in free and now.get(name) != value]
    if changed:
        raise ValueError(f"--resume: {out} was started with other settings, now {'; '.join(changed)}")
    return last


def restore(last: dict, model: nn.Module, optimizer, scaler, amp: str, out: Path) -> None:
    """Put a run back where OUT/last.pt left it; ValueError under another precision, which would compute something else."""
    if last["amp"] != amp:
        raise ValueError(f"--resume: {out} was started with --amp {last['amp']}, here it would be {amp}; give --amp {last['amp']}")
    load_strictly(model, last["model"], out / "last.pt")
    optimizer.load_state_dict(last["optimizer"])
    scaler.load_state_dict(last["scaler"])


def write_atomically(path: Path, write) -> None:
    """write(file) into a temporary file, then rename: a kill or a full disk leaves the older file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: Path, content: dict) -> None:
    """The one writer of checkpoints; read_checkpoint is the one reader."""
    write_atomically(path, lambda file: torch.save(content, file))


def write_json(path: Path, content) -> None:
    """config.json, results.json."""
    write_atomically(path, lambda file: file.write((json.dumps(nan_to_none(content), indent=1) + "\n").encode()))


def append_json(path: Path, **entry) -> None:
    """One line of log.jsonl."""
    with open(path, "a") as file:
        file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in entry.items()}) + "\n")


def rewind_log(path: Path, epoch: int, step: int, entry: dict) -> None:
    """log.jsonl as it was when last.pt was written: a run may have been killed before or after that."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            said = json.loads(line)
        except json.JSONDecodeError:  # cut off
            continue
        if said["epoch"] <= epoch or (said["epoch"] == epoch + 1 and said.get("step", math.inf) <= step):
            kept.append(said)
    if entry and not any(said["epoch"] == epoch and "step" not in said for said in kept):
        kept.append(entry)
    write_atomically(path, lambda file: file.write("".join(json.dumps(said) + "\n" for said in kept).encode()))


def encoder_content(encoder: ResNet1D, view: View, seen: list[dict]) -> dict:
    """The part of every checkpoint that `load_encoder` reads."""
    weights = {key: value.detach().cpu().clone() for key, value in encoder.state_dict().items()}
    return dict(encoder=weights, architecture=encoder.architecture, **view._asdict(), seen=seen)


def environment() -> dict:
    """What config.json says beside the settings: versions, git revision, hardware."""
    import platform
    import subprocess

    here, git = Path(__file__).resolve().parent, None
    if (here / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True).stdout.strip() or None
    versions = dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__, git=git)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(date=time.strftime("%Y-%m-%d"), **versions, gpu=gpu, cores=os.cpu_count())


def demo_settings(config, demo: dict, ranks: Ranks):
    """The settings without --data; flags that the user has set stay.  Said in the first line."""
    changed = {name: value for name, value in demo.items() if name not in config.given and getattr(config, name) == getattr(type(config)(), name)}
    flags = ((f"--{name.replace('_', '-')}", value[0] if isinstance(value, list) else value) for name, value in changed.items())
    said = " ".join(flag if value is True else f"{flag} {value}" for flag, value in flags)
    ranks.print(f"no --data, so this is a demonstration on synthetic ECG with {said}")
    changed = dataclasses.replace(config, **changed)
    changed.given = config.given
    return changed


def gather_records(config, rate_hz: float, stream: int) -> Records:
    """All collections of --data, each cut to --limit; `stream` keeps the synthetic records of the two scripts apart.

    Beside real records synthetic ones only train: they are moved to an eleventh fold, which neither validates nor tests.
    """
    found = [find_records(data, sample_rate_hz=rate_hz, seed=stream)[: config.limit] for data in config.data]
    kinds = [records.sources[0][0] for records in found]
    if set(kinds) - {"synthetic"}:
        found = [dataclasses.replace(r, folds=np.full_like(r.folds, 11)) if kind == "synthetic" else r for kind, r in zip(kinds, found)]
    return functools.reduce(Records.__add__, found)


def data_seen(records: Records, labels: bool, **more) -> list[dict]:
    """Provenance: what a checkpoint says of the records it was trained on, or with use="validation" was chosen by."""
    seen = []
    for s in np.unique(records.source):
        kind, root = records.sources[s]
        folds = sorted(int(f) for f in np.unique(records.folds[records.source == s]) if 1 <= f <= 10)
        name = kind if kind in ("ptb-xl", "mimic-iv-ecg") else f"{kind}:{Path(root).name}"
        seen.append({"data": name, **({"folds": folds} if folds else {}), "labels": labels, "records": int((records.source == s).sum()), **more})
    return seen


def data_used(train: Records, val: Records, labels: bool) -> list[dict]:
    """Provenance of one training: the records that trained, and those that chose."""
    return data_seen(train, labels) + data_seen(val, labels, use="validation")


def cost(encoders: Sequence[ResNet1D], view: View, device: torch.device) -> dict:
    """Table 4: parameters and multiply-accumulates (one 10 s record) of the encoders together, and the peak memory so far in MiB."""
    from torch.utils.flop_counter import FlopCounterMode

    macs = 0
    for encoder in encoders:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            ResNet1D(**encoder.architecture)(torch.empty(1, encoder.leads, round(10 * view.sample_rate_hz)))
        macs += counter.get_total_flops() // 2
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return dict(parameters=sum(p.numel() for encoder in encoders for p in encoder.parameters()), macs=macs, peak_mib=round(peak))


def say_cost(cost: dict) -> str:
    """The same as words."""
    rate = f", {cost['records_per_second']:,.0f} records/s" if "records_per_second" in cost else ""
    return f"{cost['parameters']:,} parameters, {cost['macs'] / 1e9:.3f} GMAC a record, peak memory {cost['peak_mib']:,} MiB a process{rate}"


def autocast(device: torch.device, amp: str):
    """(a function that opens an autocast context, a gradient scaler) for --amp; only fp16 needs the scaler to do anything."""
    if amp == "auto":
        amp = "off" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return lambda: torch.autocast(device.type, dtype, enabled=amp != "off"), scaler, amp


def distribute(model: nn.Module, config, ranks: Ranks) -> nn.Module:
    """What the training step calls: the model, its encoder compiled on request, its gradients averaged over processes."""
    if config.compile:
        model.encoder.compile(mode="reduce-overhead")
    if ranks.world == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)


def epoch_batches(rows: np.ndarray, config, epoch: int, ranks: Ranks) -> list[np.ndarray]:
    """This process's part of every batch of an epoch; a function of (seed, epoch) alone.  The incomplete last batch is dropped."""
    order = rows[np.random.default_rng([config.seed, epoch]).permutation(len(rows))]
    B, W = config.batch_size, ranks.world
    if len(order) < B * W:
        raise ValueError(f"{len(order):,} usable training records do not fill one batch of {W} x {B}; give a smaller --batch-size")
    return [order[i + ranks.rank * B :][:B] for i in range(0, len(order) - B * W + 1, B * W)]


def cosine_lr(peak: float, step: int, steps: int, warmup: int = 0) -> float:
    """Learning rate of a step from 0: `warmup` steps up in a line, then half a cosine from the peak to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def embed(encoder: ResNet1D, signals: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Embeddings (N, D) float32 on the CPU of signals (N, L, T), computed in float32.

    Chunks are padded to one size, because the last bit of a convolution may depend on how many records it sees.
    """
    chunk = 128 if device.type == "cuda" else 32
    parts = []
    for i in range(0, len(signals), chunk):
        x = signals[i : i + chunk].to(device, torch.float32)
        n = len(x)
        parts.append(encoder(F.pad(x, (0, 0, 0, 0, 0, chunk - n)))[:n].float().cpu())
    return torch.cat(parts) if parts else torch.empty(0, encoder.embedding_dim)


@dataclasses.dataclass
class Pairs:
    """What training reads: rows of (preprocessed lead, teacher embedding), out of the cache or straight from the records.

    Both are rounded to float16 on either way, so that both give the same bits.
    """

    dataset: SelfCuttingDataset
    teacher: ResNet1D | None
    device: torch.device
    workers: int
    usable: np.ndarray  # the rows that can be read
    signals: np.ndarray | torch.Tensor | None = None  # (N, L, T) float16; None: read on the fly
    targets: np.ndarray | torch.Tensor | None = None  # (N, D) float16
    unusable: dict = dataclasses.field(default_factory=dict)  # how many were left out, and why the first of them

    def batches(self, rows: Sequence[np.ndarray], with_targets: bool = True):
        """For each array of rows: signals (B, L, T) and teacher embeddings (B, D) or None, float32 on the device."""
        with_targets = with_targets and self.teacher is not None
        if self.signals is not None:
            for r in rows:
                yield self.on_device(self.signals[r]), self.on_device(self.targets[r]) if with_targets else None
            return
        loader = DataLoader(self.dataset, batch_sampler=[r.tolist() for r in rows], num_workers=self.workers)
        for single, multi in loader:
            yield self.on_device(single.half()), self.on_device(embed(self.teacher, multi, self.device).half()) if with_targets else None

    def on_device(self, rows) -> torch.Tensor:
        return torch.as_tensor(rows).to(self.device, non_blocking=True).float()

    def make_resident(self) -> bool:
        """Move all pairs into the GPU's memory if they take less than half of what is free there."""
        if self.signals is None or self.device.type != "cuda":
            return False
        arrays = [self.signals] + ([] if self.targets is None else [self.targets])
        if 2 * sum(a.nbytes for a in arrays) > torch.cuda.mem_get_info(self.device)[0]:
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the file is not writable: it is only copied
            self.signals, self.targets = (None if a is None else torch.from_numpy(a).to(self.device) for a in (self.signals, self.targets))
        return True


class Trial(Dataset):
    """Items of a SelfCuttingDataset with their row; one that cannot be used comes as the reason instead."""

    def __init__(self, pairs: SelfCuttingDataset, rows: np.ndarray):
        self.pairs, self.rows = pairs, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, j: int):
        row = int(self.rows[j])
        try:
            single, multi = self.pairs[row]
            return row, single.half().numpy(), multi.numpy()  # a tensor would take an open file each on its way
        except (ValueError, OSError) as error:
            return row, str(error), None


def store_array(folder: Path | None, key: str, shape: tuple[int, ...], dtype, ranks: Ranks):
    """A zero-filled array on disk that all processes write rows of, as (path, memory map); an existing one is kept.

    It is created sparse under another name first, so that a kill cannot leave half a header, and linked, not renamed, so
    that of two runs that start together the second takes the first one's.
    """
    path = folder / f"{key}.npy"
    if ranks.local_rank == 0 and not path.exists():
        temporary = folder / f"{key}.{os.uname().nodename}.{os.getpid()}.tmp"
        np.lib.format.open_memmap(temporary, "w+", dtype, shape).flush()
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
    ranks.barrier()
    array = np.load(path, mmap_mode="r")
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path}: holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}; delete it")
    return path, array


def write_row(file, array: np.ndarray, row: int, value: np.ndarray) -> None:
    """One row by ordinary writes: on a full disk that is an error, where writing to a memory map is a crash."""
    data, at = memoryview(np.ascontiguousarray(value).tobytes()), array.offset + row * array.strides[0]
    while data:
        try:
            n = os.pwrite(file, data, at)  # on a disk that is nearly full less than all of it
        except OSError as error:
            raise ValueError(f"the cache cannot be written ({error.strerror}): free space, or give another --cache; what is in it stays") from error
        data, at = data[n:], at + n


CACHE_VERSION = 5  # raise it when read_ecg, preprocess or synthesize return something else than before


def read_pairs(config, records: Records, view: View, ranks: Ranks, what: str, teacher: ResNet1D | None = None) -> Pairs:
    """Read every record once and keep (preprocessed lead, teacher embedding): all that training touches afterwards.

    The teacher is frozen and sees unchanged records, so its embedding is a constant of the record.  All processes share
    the pass; rows that an earlier or a killed pass wrote are kept.  Each array is named by all that could change its
    content but a file that was replaced under the same name: the signals without the teacher, the embeddings without the
    lead, so that ablations share what they can.
    With --cache none this pass only finds the usable records.  Unusable ones are named, counted and left out, or with
    --strict an error; no usable record is an error.
    """
    N, L, T = len(records), len(LEADS) if view.lead == "all" else 1, round(10 * view.sample_rate_hz)
    workers = config.workers if config.workers is not None else min(16, os.cpu_count() // ranks.local_world)
    dataset = SelfCuttingDataset(records, view.lead, sample_rate_hz=view.sample_rate_hz, multi=teacher is not None, **view.preprocessing)
    pairs = Pairs(dataset, teacher, ranks.device, workers, np.arange(N))
    key = [CACHE_VERSION, records.digest(), view.sample_rate_hz, view.preprocessing]
    name = lambda kind, *parts: f"{kind}-{hashlib.sha256(json.dumps([*key, *parts]).encode()).hexdigest()[:16]}"
    wanted = {}
    if config.cache != "none":
        wanted[name("signals", view.lead)] = (N, L, T)
        if teacher is not None:
            weights = hashlib.sha256()
            for k, v in teacher.state_dict().items():
                weights.update(k.encode() + v.cpu().numpy().tobytes())
            wanted[name("targets", weights.hexdigest())] = (N, teacher.embedding_dim)
    folder = Path(config.cache or Path(config.out).absolute().parent / "cache")
    shared = prepare_cache(folder, wanted, what, ranks)
    part, parts = (ranks.rank, ranks.world) if shared else (ranks.local_rank, ranks.local_world)
    arrays = [store_array(folder, key, shape, np.float16, ranks) for key, shape in wanted.items()]
    marks = [store_array(folder, key + "-done", (N,), np.uint8, ranks) for key in wanted]
    todo = np.flatnonzero(np.any([mark != 1 for _, mark in marks], axis=0)) if wanted else np.arange(N)
    mine = todo[todo % parts == part]  # by the row's number: another process may see other marks already

    good, problems, start, said = [], [], time.time(), time.time()
    files = [(os.open(path, os.O_WRONLY), os.open(mark, os.O_WRONLY)) for (path, _), (mark, _) in zip(arrays, marks)]
    loader = DataLoader(Trial(dataset, mine), batch_size=64, num_workers=workers if len(mine) > 256 else 0, collate_fn=list)
    try:
        for n, batch in enumerate(loader, 1):
            problems += [reason for _, reason, multi in batch if multi is None]
            if problems and config.strict:
                raise ValueError(f"--strict: {problems[0]}")
            batch = [item for item in batch if item[2] is not None]
            good += [row for row, _, _ in batch]
            if batch and wanted:
                values = [np.stack([single for _, single, _ in batch])]
                if teacher is not None:
                    multi = torch.from_numpy(np.stack([multi for _, _, multi in batch]))
                    values.append(embed(teacher, multi, ranks.device).half().numpy())
                for (file, mark_file), (_, array), (_, mark), value in zip(files, arrays, marks, values):
                    for (row, _, _), v in zip(batch, value):
                        write_row(file, array, row, v)  # the row first, then its mark: a kill in between repeats the row
                        write_row(mark_file, mark, row, np.uint8(1))
            if time.time() - said > 10:
                said, rate = time.time(), min(64 * n * parts, len(todo)) / (time.time() - start)
                left = max(0, len(todo) - 64 * n * parts)
                ranks.print(f"{what}: {len(todo) - left:,} of {len(todo):,} records read | {rate:,.0f} records/s | eta {left / rate / 60:.1f} min")
    finally:
        for file in sum(files, ()):
            os.close(file)
    problems = sum(ranks.gather_objects(problems), []) if shared else problems  # also waits for the other processes
    ranks.barrier()
    if wanted:  # opened again: on a network drive the first view may be stale
        arrays, marks = ([(path, np.load(path, mmap_mode="r")) for path, _ in both] for both in (arrays, marks))
        pairs.signals, pairs.targets = arrays[0][1], arrays[1][1] if teacher is not None else None
        pairs.usable = np.flatnonzero(np.all([mark == 1 for _, mark in marks], axis=0))
    else:
        pairs.usable = np.sort(np.concatenate(ranks.gather_objects(np.array(good, int))))
    if problems:
        some = "; ".join(problems[:3]) + (" ..." if len(problems) > 3 else "")
        ranks.print(f"{what}: {len(problems):,} of {N:,} records cannot be used and are left out: {some}")
    if not len(pairs.usable):
        raise ValueError(f"{what}: none of {N:,} records can be used; the first: {(problems or ['not said'])[0]}")
    digests = ranks.gather_objects(hashlib.sha256(pairs.usable.tobytes()).hexdigest())
    if len(set(digests)) > 1:
        raise ValueError(f"{what}: not every machine can use the same records; give all of them the same data")
    pairs.unusable = dict(count=N - len(pairs.usable), first=problems[:3])
    return pairs


def prepare_cache(folder: Path, wanted: dict[str, tuple[int, ...]], what: str, ranks: Ranks) -> bool:
    """Make the folder, say and check the space; True if all machines see the same folder and can share the work."""
    if not wanted:
        return True
    if ranks.local_rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--cache {folder}: cannot be made ({error.strerror}); give another folder, or none") from error
        need = sum(2 * math.prod(shape) for key, shape in wanted.items() if not (folder / f"{key}.npy").exists()) / 2**30
        free = shutil.disk_usage(folder).free / 2**30
        if need > free:
            raise ValueError(f"--cache {folder}: {need:.1f} GiB are needed, {free:.1f} GiB are free; give another folder, or none")
        if need:
            ranks.print(f"{what}: the cache takes {need:.2f} GiB in {folder} ({free:.0f} GiB free)")
    token = folder / (ranks.gather_objects(os.urandom(8).hex())[0] + ".shared")
    if ranks.first:
        token.touch()
    ranks.barrier()
    shared = all(ranks.gather_objects(token.exists()))
    ranks.barrier()
    if ranks.first:
        token.unlink(missing_ok=True)
    return shared


# ----------------------------------------------------------------------------------------------------------------------
# The command line of this module: plot, detect, export, info
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """python selfmis.py COMMAND; what a user can cause is one sentence and exit code 2."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.set_defaults(run=lambda arguments: parser.print_help(), debug=False)
    commands = parser.add_subparsers()

    def command(name: str, run, help: str):
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(run=run)
        return added.add_argument

    add = command("plot", run_plot, "draw the usual 12-lead chart of a record")
    add("record", nargs="?", help="a WFDB record, with or without .hea")
    add("out", help="the picture, .png, .pdf or .svg")
    add("--synthetic", choices=SYNTHETIC_TYPES, metavar="TYPE", help="instead of a record: " + ", ".join(SYNTHETIC_TYPES))
    add("--stage", choices=tuple(STAGES), default="old", help="of a synthetic infarct (default: old)")
    add("--seed", type=int, default=0, help="which synthetic patient")
    add = command("detect", run_detect, "probabilities of the nine infarct types in recordings")
    add("probe", help="probe.pt of train_probe.py")
    add("recordings", nargs="+", help="WFDB records, .csv, .tsv, .txt or .npy files, or folders of them")
    add("--sample-rate", type=float, metavar="HZ", help="where the file does not say it, or says it wrong")
    add("--unit", choices=("V", "mV", "uV", "nV"), help="of .npy and text files (default: what a header says, else mV)")
    add("--column", help="name or number (from 1; times, counters and words not counted) of the column in text files")
    both = "threshold: best sensitivity + specificity, or 90 %% sensitivity, on the validation fold (default: youden)"
    add("--point", choices=("youden", "sensitivity_90"), default="youden", help=both)
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--picture", metavar="OUT.png", help="draw the strip and the probabilities; one recording only")
    add = command("export", lambda given: print(export_detector(given.probe, given.out)), "write a detector as ONNX or as a torch.export program")
    add("probe", help="probe.pt of train_probe.py")
    add("out", help="OUT.onnx or OUT.pt2")
    add = command("info", lambda given: print(describe_checkpoint(given.file)), "what is stored in a checkpoint")
    add("file", help="best.pt, last.pt, probe.pt or an ECGFounder file")
    arguments = parser.parse_args(argv)
    try:
        status = arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        status = print(f"error: {error}", file=sys.stderr) or 2
    if status is not None:
        sys.exit(status)


def run_plot(arguments) -> None:
    """A chart of a record, or of a synthetic one."""
    if (arguments.record is None) == (arguments.synthetic is None):
        raise ValueError("plot: give either a record or --synthetic TYPE")
    if kind := arguments.synthetic:
        ecg = synthesize(1, arguments.seed, types=kind, stage=arguments.stage)[0][0]
        title = f"synthetic {kind}" + f", {arguments.stage}" * (kind in MI_TYPES)
    else:
        ecg, title = read_ecg(arguments.record), Path(arguments.record).stem
    plot_ecg(ecg, arguments.out, title=title)
    print(f"{title}: {arguments.out}")


def run_detect(arguments) -> int:
    """A table for each recording that can be read, a sentence for each that cannot; 2 if there was such a one, else 0."""
    detector, found, failed = load_detector(arguments.probe), [], 0
    points, kinds = detector.points[arguments.point], (".hea", ".csv", ".tsv", ".txt", ".npy")
    inside = lambda folder: sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds and path.is_file())
    paths = [path for given in map(Path, arguments.recordings) for path in (given.is_dir() and inside(given) or [given])]
    if arguments.picture and len(paths) > 1:
        raise ValueError(f"--picture: draws one recording, {len(paths)} were given")
    for path in paths:
        try:
            if path.is_dir():
                raise ValueError(f"{path}: a folder without recordings")
            ecg, rate, said = read_recording(path, detector.leads, sample_rate_hz=arguments.sample_rate, unit=arguments.unit, column=arguments.column)
            answer = detector(ecg, rate)
        except (ValueError, OSError) as error:
            if arguments.debug:
                raise
            text = str(error) if str(path).removesuffix(".hea") in str(error) else f"{path}: {error}"
            print(f"error: {text}", file=sys.stderr, flush=True)
            found.append(dict(file=str(path), error=text))
            failed = 2
            continue
        said += check_recording(ecg, rate, detector.leads)
        types = {}
        for t, p in answer.items():
            threshold, sensitivity, specificity = points[t]
            verdict = dict(positive=None if math.isnan(threshold) else p >= threshold, validation_positives=detector.positives[t])
            types[t] = dict(probability=p, threshold=threshold, sensitivity=sensitivity, specificity=specificity) | verdict
        seen = dict(leads=detector.leads, seconds=ecg.shape[1] / rate, sample_rate_hz=rate)
        found.append(dict(file=str(path), **seen, point=arguments.point, warnings=said, types=types))
        if arguments.picture:
            draw_detection(arguments.picture, ecg[0], rate, f"{path.stem}, lead {detector.leads[0]}", answer, points, arguments.point)
        if not arguments.json:
            print(f"\n{path}: {ecg.shape[1] / rate:.1f} s at {rate:g} Hz, lead {' '.join(detector.leads)}")
            print("".join(f"warning: {text}\n" for text in said), end="")
            print(f"{'':<7}probability  threshold  sensitivity  specificity  verdict ({arguments.point} on the validation fold)")
            for t, (p, threshold, sensitivity, specificity, positive, n) in zip(types, (entry.values() for entry in types.values())):
                none = "no threshold is better than a guess" if n >= 10 else f"too few cases for a threshold ({n})"
                verdict = {None: none, True: "POSITIVE", False: "negative"}[positive]
                few = f" (threshold from {n} cases)" if n < 20 and positive is not None else ""
                usable = f"{threshold:.4f}" if positive is not None else "-"
                print(f"{t:<7}{p:11.4f}{usable:>11}{sensitivity:13.2f}{specificity:13.2f}  {verdict}{few}")
    end = "\nresearch code, not a medical device: an infarct of today needs an emergency call, not this table"
    print(json.dumps(nan_to_none(found), indent=1) if arguments.json else end)
    return failed


if __name__ == "__main__":
    main()
