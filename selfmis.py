"""SelfMIS: teach a single-lead ECG encoder to see what twelve leads see (arXiv 2509.19397).

A frozen 12-lead encoder f_m embeds a whole record, a single-lead encoder f_s embeds lead I cut
out of the same record, and a sigmoid loss pulls the two embeddings of one record together and
pushes all other pairs apart.  A linear head on the frozen f_s then detects nine types of
myocardial infarction from lead I.

    paper           what                                                    here
    2.2, Eq. (1)    pair (S_i, M_i), S = lead I of M, else unchanged        self_cut
    2.3, Eq. (2)    z_s = f_s(S), z_m = stopgrad(f_m(M)), both (B, D)       SelfMIS.forward, embed
    2.4, Eq. (3)    -1/B sum_ij log sigmoid(z_ij (t <S_i, M_j> - b))        siglip_loss
    3.2, Table 8    linear head on frozen z_s                               train_probe.py
    Tables 1-3, 5   macro AUC over nine types; R@1, R@5, R@10               macro_auc, retrieval
    Table 7         pre-training recipe                                     train_pretrain.py

Order of this file: constants, encoder, its files, signals, records, pairs, loss, metrics; then,
below the banner "Runs", what both scripts need.  All above that banner can be copied alone: it
needs torch and numpy, and wfdb (which brings scipy and pandas) only inside the functions that read
files, resample or filter; extras/ only for records of synthetic:N and for files of other networks.

Letters in shapes: B records of a batch, N records in all, L leads, T samples, C channels,
D embedding, K classes, R resamples, W processes.
"""

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

# The nine infarct types of the paper: PTB-XL's MI statements without the five of subendocardial
# injury (INJ..).
MI_TYPES = ("ALMI", "AMI", "ASMI", "ILMI", "IMI", "IPLMI", "IPMI", "LMI", "PMI")
# Those with at least 20 positives in PTB-XL's test fold: the mean over these six is to be trusted.
SIX_TYPES = ("ALMI", "AMI", "ASMI", "ILMI", "IMI", "LMI")

# The 44 diagnostic statements of PTB-XL (scp_statements.csv, diagnostic == 1), sorted: the columns
# of every label array.
STATEMENTS = tuple(
    "1AVB 2AVB 3AVB ALMI AMI ANEUR ASMI CLBBB CRBBB DIG EL ILBBB ILMI IMI INJAL INJAS INJIL INJIN "
    "INJLA IPLMI IPMI IRBBB ISCAL ISCAN ISCAS ISCIL ISCIN ISCLA ISC_ IVCD LAFB LAO/LAE LMI LNGQT "
    "LPFB LVH NDT NORM NST_ PMI RAO/RAE RVH SEHYP WPW".split()
)


class UsageError(ValueError):
    """What a user can cause, as one sentence with the value, the place and the remedy.

    The scripts print the sentence; every other exception is a defect and keeps its traceback.
    """


class RecordError(UsageError):
    """A record that cannot be used; training counts it, names it and goes on without it."""


def import_optional(module: str, purpose: str):
    """A module of a package that only `purpose` needs, or the sentence that says how to get it."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{purpose} needs the package {package}: pip install {package}") from error


def import_extra(module: str):
    """A module of extras/, or None where that has been deleted."""
    try:
        return importlib.import_module(f"extras.{module}")
    except ModuleNotFoundError as error:
        if not f"extras.{module}.".startswith(f"{error.name}."):  # what that module imports
            raise
        return None


# --------------------------------------------------------------------------------------------------
# Encoder: ECGFounder's Net1D, without the BatchNorm modules it never calls and its 150-class head
# --------------------------------------------------------------------------------------------------

SIZES = {
    "ecgfounder": dict(
        stem=64, widths=[64, 160, 160, 400, 400, 1024, 1024], depths=[2, 2, 2, 3, 3, 4, 4]
    ),
    "small": dict(stem=32, widths=[32, 80, 80, 208, 208, 512, 512], depths=[1, 1, 1, 2, 2, 2, 2]),
}


class SameConv1d(nn.Module):
    """Convolution (B, C, 1, T) -> (B, C', 1, ceil(T / stride)), padded with zeros.

    An odd number of zeros puts the extra one on the right.  Signals have four dimensions in here
    because only such tensors can have the channels-last layout, in which the channels of a sample
    are neighbours in memory.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        # A level of its own, so that keys are ECGFounder's: first_conv.conv.weight.
        self.conv = nn.Conv1d(c_in, c_out, kernel_size, stride, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (kernel,) = self.conv.kernel_size
        (stride,) = self.conv.stride
        if kernel == stride == self.conv.groups == 1:
            # A matrix product, which is faster than a convolution in small batches.
            weight = self.conv.weight.flatten(1)  # (C', C)
            return F.linear(x.movedim(1, -1), weight, self.conv.bias).movedim(-1, 1)
        T = x.shape[-1]
        zeros = max(0, (math.ceil(T / stride) - 1) * stride + kernel - T)
        left = zeros // 2
        if zeros % 2:
            x = F.pad(x, (left, left + 1))
            left = 0
        # The gradient of unsqueeze(2) would have other strides than the weight, and
        # DistributedDataParallel would copy it in each step; this way it has the same.
        weight = self.conv.weight.flatten(1).unflatten(1, (-1, 1, kernel))  # (C', C / groups, 1, k)
        padding = (0, left)
        return F.conv2d(x, weight, self.conv.bias, (1, stride), padding, groups=self.conv.groups)


class Block(nn.Module):
    """Pre-activation 1x1, grouped k x 1, 1x1, squeeze-excitation; a shortcut without weights."""

    def __init__(
        self, c_in: int, c_out: int, kernel_size: int, stride: int, group_width: int, is_first: bool
    ) -> None:
        super().__init__()
        self.stride = stride
        self.is_first = is_first
        self.channels_before = (c_out - c_in) // 2
        self.channels_behind = c_out - c_in - self.channels_before
        self.conv1 = SameConv1d(c_in, c_out, 1)
        self.conv2 = SameConv1d(c_out, c_out, kernel_size, stride, groups=c_out // group_width)
        self.conv3 = SameConv1d(c_out, c_out, 1)
        self.se_fc1 = nn.Linear(c_out, c_out // 2)
        self.se_fc2 = nn.Linear(c_out // 2, c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.is_first else F.silu(x)  # (B, C, 1, T); the stem has activated it already
        h = self.conv1(h)  # (B, C', 1, T)
        h = self.conv2(F.silu(h))  # (B, C', 1, T / stride)
        h = self.conv3(F.silu(h))
        gate = self.se_fc1(h.mean((2, 3)))  # (B, C' / 2)
        gate = torch.sigmoid(self.se_fc2(F.silu(gate)))  # (B, C')
        return h * gate[:, :, None, None] + self.shortcut(x)

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """Maximum of neighbours, and channels of zeros where the block is wider than its input."""
        if self.stride > 1:
            # The original pads with 0, not with -inf: it shows at odd lengths.
            x = F.max_pool2d(F.pad(x, (0, 1)), (1, self.stride))
        if self.channels_behind:
            x = F.pad(x, (0, 0, 0, 0, self.channels_before, self.channels_behind))
        return x


class ResNet1D(nn.Module):
    """ECGFounder's network up to its embedding, the mean over time.

    (B, leads, T) float -> (B, D) float, for any T of at least 16.  The default has 30,587,632
    parameters for one lead, 30,598,896 for twelve, and D = 1024.  Keys of the state_dict are
    ECGFounder's own, so weights go both ways.  There is no normalisation layer and no dropout:
    train() and eval() compute the same, and several processes compute what one does.

    Attributes: leads, embedding_dim, architecture (the arguments that rebuild it); lead,
    sample_rate_hz, preprocessing and training_data say how to feed it and what it has seen
    (None and empty until `load_encoder` knows).
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
    ) -> None:
        super().__init__()
        if len(widths) != len(depths) or any(width % group_width for width in widths):
            raise UsageError(
                f"widths {widths}, depths {depths}: give a depth each, multiples of {group_width}"
            )
        self.architecture = dict(leads=leads, stem=stem, widths=list(widths), depths=list(depths))
        self.architecture |= dict(kernel_size=kernel_size, group_width=group_width)
        self.leads = leads
        self.embedding_dim = widths[-1]
        self.lead: str | None = None
        self.sample_rate_hz: float | None = None
        self.preprocessing: dict | None = None
        self.training_data: list[dict] = []

        self.first_conv = SameConv1d(leads, stem, kernel_size, stride=2)
        self.stage_list = nn.ModuleList()
        c_in = stem
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = nn.ModuleList()
            for b in range(depth):
                stride = 2 if b == 0 else 1
                is_first = stage == 0 and b == 0
                blocks.append(Block(c_in, width, kernel_size, stride, group_width, is_first))
                c_in = width
            self.stage_list.append(nn.ModuleDict({"block_list": blocks}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise UsageError(f"an input of type {type(x).__name__}: give a torch tensor")
        dtype = self.first_conv.conv.weight.dtype
        if x.ndim != 3 or x.shape[1] != self.leads or x.shape[2] < 16 or x.dtype != dtype:
            expected = f"(records, {self.leads} leads, at least 16 samples) of {dtype}"
            raise UsageError(f"an input of shape {tuple(x.shape)}, {x.dtype}: expected {expected}")
        x = self.first_conv(x.unsqueeze(2))  # (B, C, 1, T / 2)
        if x.device.type != "mps":  # whose convolutions do not take this layout
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.silu(x)
        for stage in self.stage_list:
            for block in stage["block_list"]:
                x = block(x)
        # The mean in float32 at least, also under autocast.
        return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))  # (B, D)


def with_empty_leads(signals: torch.Tensor, encoder: ResNet1D, lead: str) -> torch.Tensor:
    """(B, 1, T) of one lead as a 12-lead encoder takes it, zeros in the other eleven rows.

    Signals that have the encoder's number of leads already come back as they are.
    """
    if signals.shape[1] == encoder.leads:
        return signals
    before = lead_index(lead)
    behind = encoder.leads - 1 - before
    return F.pad(signals, (0, 0, before, behind))  # (B, 12, T)


# --------------------------------------------------------------------------------------------------
# Files of encoders
# --------------------------------------------------------------------------------------------------

# ECGFounder's files hold the BatchNorm modules that it builds but never calls, and its 150-class
# head: these keys, and no others, are ignored.
UNUSED_KEYS = re.compile(r"(first_bn|dense|stage_list\.\d+\.block_list\.\d+\.bn[123])\.\w+")


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a .pt or .pth file, on the CPU.  UsageError if it cannot be read.

    Always with weights_only=True, so that a file cannot run code.
    """
    # ECGFounder's files hold a NumPy scalar, which torch refuses unless it is named; NumPy 1.x
    # wrote it under another name.
    core = np._core if hasattr(np, "_core") else np.core
    scalar = core.multiarray.scalar
    old_scalar = (scalar, "numpy.core.multiarray.scalar")
    allowed = [scalar, old_scalar, np.dtype, type(np.dtype("float64"))]
    if os.path.isdir(path):
        raise UsageError(f"{path}: a folder; give the best.pt or probe.pt in it")
    if not os.path.isfile(path):
        raise UsageError(f"{path}: there is no such file")
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for broken files; all mean the same
        reasons = "cut off in a copy, or with Python objects in it (then save its state_dict alone)"
        raise UsageError(f"{path}: not a checkpoint that can be loaded: {reasons}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def load_strictly(module: nn.Module, state: dict, path: str | os.PathLike) -> None:
    """module.load_state_dict with one UsageError that names every key that does not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # several indented lines, a key each
        keys = " ".join(str(error).split())
        raise UsageError(f"{path}: weights of another network: {keys}") from error
    for key, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise UsageError(f"{path}: {key} is not finite; train it again")


def plain_state(content: dict, path: str | os.PathLike) -> dict:
    """The state_dict in an ECGFounder file, or the file's content where that is one itself."""
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise UsageError(f"{path}: its state_dict is a {type(state).__name__}, not weights by name")
    state = {str(key): value for key, value in state.items()}
    # Of torch.compile and DistributedDataParallel, in either order.
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_ecgfounder(path: str | os.PathLike, leads: int) -> ResNet1D:
    """The encoder of 1_lead_ECGFounder.pth or 12_lead_ECGFounder.pth, in eval mode.

    A plain state_dict does too.  Every key is used but UNUSED_KEYS; UsageError names each one that
    is missing, unknown or of another shape.
    """
    if leads not in (1, 12):
        raise UsageError(f"{path}: {leads} leads; ECGFounder has encoders of 1 and of 12")
    state = plain_state(read_checkpoint(path), path)
    state = {key: value for key, value in state.items() if not UNUSED_KEYS.fullmatch(key)}
    encoder = ResNet1D(leads)
    load_strictly(encoder, state, path)
    encoder.lead = "I" if leads == 1 else "all"
    encoder.sample_rate_hz = 500
    encoder.training_data = [{"data": "ECGFounder's own", "labels": True}]
    return encoder.eval()


ENCODERS = {"ResNet1D": ResNet1D}  # by the name in a checkpoint; extras.baselines adds its own


def network_class(name: str, path: str | os.PathLike):
    """The class of an encoder; a file can name those of ENCODERS and nothing else."""
    if name not in ENCODERS:
        import_extra("baselines.networks")
    if name not in ENCODERS:
        raise UsageError(f"{path}: a network {name!r}; there are {', '.join(ENCODERS)}")
    return ENCODERS[name]


def load_encoder(path: str | os.PathLike) -> ResNet1D:
    """The encoder in any file: of train_pretrain.py, train_probe.py, a baseline or ECGFounder.

    In eval mode.  Its attributes say how to feed it: lead ("I", ... or "all"), sample_rate_hz and
    preprocessing (keyword arguments of `preprocess`; None: ECGFounder's file does not say), and
    training_data, what trained and chose it, its teacher's data included.  A twelve-lead encoder
    that was probed on one lead (leads 12, lead "I") wants `with_empty_leads`.
    """
    content = read_checkpoint(path)
    if "architecture" not in content:
        stem = plain_state(content, path).get("first_conv.conv.weight")
        if stem is None:
            raise UsageError(f"{path}: no encoder of selfmis in it, and no ECGFounder file either")
        return load_ecgfounder(path, leads=stem.shape[1])
    kinds = {"architecture": dict, "encoder": dict, "training_data": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    inputs = ("lead", "sample_rate_hz", "preprocessing")
    wrong += [name for name in inputs if name not in content]
    if wrong:
        raise UsageError(f"{path}: no {wrong[0]} as this version writes it; train it again")
    network = network_class(content.get("network", "ResNet1D"), path)
    encoder = network(**content["architecture"])
    load_strictly(encoder, plain_state(content["encoder"], path), path)
    for name in (*inputs, "training_data"):
        setattr(encoder, name, content[name])
    return encoder.eval()


# --------------------------------------------------------------------------------------------------
# Signals: from a record on disk to what an encoder sees
# --------------------------------------------------------------------------------------------------

# Of every voltage a record may be stored in, how many millivolts it is.  Micro sign and Greek mu
# both occur in texts; in a WFDB header they would be read as volts.
MILLIVOLTS = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}
# In UTF-8 or Latin-1, in a line that is no comment.
MICROVOLTS = re.compile(b"(?im)^[^#\n]*/(\xc2\xb5|\xce\xbc|\xb5)V")
SECONDS = 10.0  # what an encoder sees of a record
MINIMUM_SECONDS = 2.5  # a shorter record has too few beats to read and is refused


def lead_names(leads: str | Sequence[str]) -> tuple[str, ...]:
    """One name ("II" is a name here, not a sequence of two letters) or several, as a tuple."""
    if isinstance(leads, str):
        return (leads,)
    return tuple(leads)


def lead_index(lead: str) -> int:
    """Position in LEADS, whatever the case."""
    names = [name.upper() for name in LEADS]
    if str(lead).upper() not in names:
        raise UsageError(f"lead {lead!r}: expected one of {', '.join(LEADS)}")
    return names.index(lead.upper())


def read_ecg(
    record: str | os.PathLike, leads: str | Sequence[str] = LEADS, sample_rate_hz: float = 500
) -> np.ndarray:
    """Leads of a WFDB record, by name: (len(leads), T) float32 in mV at sample_rate_hz.

    record: path with or without .hea.  Names are matched whatever their case or order (PTB-XL
    writes AVR, MIMIC-IV-ECG stores aVF before aVL); V, mV, uV and nV become mV; NaN and infinite
    samples become 0; another rate is resampled.  The length is kept (`preprocess` sets it), and so
    is a flat lead (`SelfCuttingDataset` refuses it).
    RecordError names the record: missing or unreadable, no such lead, unknown unit, no samples.
    """
    ecg, rate_hz = read_wfdb(record, leads)
    return resample(nan_to_zero(ecg), rate_hz, sample_rate_hz).astype(np.float32)


def read_wfdb(record: str | os.PathLike, leads: str | Sequence[str]) -> tuple[np.ndarray, float]:
    """`read_ecg` before anything is filled or resampled.

    Returns ((len(leads), T) float64 in mV, NaN where a sample is missing; the record's own rate in
    Hz).
    """
    stem = str(record)
    for ending in (".hea", ".dat", ".mat"):
        stem = stem.removesuffix(ending)
    try:
        header = Path(stem + ".hea").read_bytes()
    except FileNotFoundError as error:
        raise RecordError(f"{stem}.hea: there is no such header file to read") from error
    except OSError as error:  # such as that of a network disk
        raise RecordError(f"{stem}.hea: cannot be read ({error.strerror})") from error
    if MICROVOLTS.search(header):
        raise RecordError(f"{stem}.hea: a unit with a micro sign, which wfdb drops; write uV")
    wfdb = import_optional("wfdb", "reading records")
    try:
        content = wfdb.rdrecord(stem)
    except Exception as error:  # wfdb raises many kinds for broken files
        raise RecordError(f"{stem}: header or signal file is missing, damaged or cut") from error
    if content.p_signal is None or not len(content.p_signal):
        raise RecordError(f"{stem}: holds no samples")
    if not 1 <= content.fs <= 20_000:
        raise RecordError(f"{stem}: a sample rate of {content.fs} Hz is not one of an ECG")

    names = [name or "?" for name in content.sig_name]
    columns = []
    for lead in lead_names(leads):
        matching = [i for i, name in enumerate(names) if name.strip().upper() == lead.upper()]
        if not matching:
            raise RecordError(f"{stem}: no lead {lead}; it has {', '.join(names)}")
        columns.append(matching[0])
    millivolts = []
    for i in columns:
        unit = content.units[i].strip()
        if unit.lower() not in MILLIVOLTS:
            raise RecordError(f"{stem}: unit {unit} of {names[i]} is not a voltage")
        millivolts.append(MILLIVOLTS[unit.lower()])
    ecg = content.p_signal[:, columns].T * np.array(millivolts)[:, None]  # (L, T)
    return ecg, float(content.fs)


def nan_to_zero(ecg: np.ndarray) -> np.ndarray:
    """NaN and infinities as 0 (np.nan_to_num alone would turn infinity into 1.8e308)."""
    return np.where(np.isfinite(ecg), ecg, 0)


def resample(ecg: np.ndarray, rate_hz: float, to_hz: float) -> np.ndarray:
    """(L, T) at rate_hz -> (L, ceil(T to_hz / rate_hz)) at to_hz, without aliases.

    The median is subtracted first and added again: of a constant the filter makes a ripple of a
    thousandth, which the z-score would enlarge, on a flat lead to the size of an ECG.
    """
    if rate_hz == to_hz:
        return ecg
    signal = import_optional("scipy.signal", "resampling")
    ratio = Fraction(to_hz / rate_hz).limit_denominator(1000)
    level = np.median(ecg, axis=-1, keepdims=True)  # (L, 1)
    up, down = ratio.numerator, ratio.denominator
    # padtype="line": the signal goes on in a line past its ends, so that they do not ring.
    return level + signal.resample_poly(ecg - level, up, down, axis=-1, padtype="line")


def preprocess(
    ecg: np.ndarray, *, sample_rate_hz: float = 500, normalize: str = "zscore", filter: str = "none"
) -> np.ndarray:
    """What an encoder sees: (L, T) in mV -> (L, 10 s * sample_rate_hz) float32.

    1. NaN and infinite samples become 0.  2. Longer records are cut to their first 10 s.
    3. filter="ecgfounder": `ecgfounder_filter`; "none": nothing.
    4. normalize="zscore": minus the mean, over the standard deviation of *this view*, all its leads
    together, so that lead I alone is scored as at test time; "none": mV.
    5. Shorter records get zeros at the end.
    RecordError below 2.5 s.  The keyword arguments stand in every checkpoint.
    """
    ecg = np.asarray(ecg)
    if ecg.ndim != 2:
        raise UsageError(f"an ECG of shape {ecg.shape}: expected (leads, samples)")
    if ecg.shape[1] < MINIMUM_SECONDS * sample_rate_hz:
        found = ecg.shape[1] / sample_rate_hz
        raise RecordError(f"{found:.2f} s of ECG is too short: {MINIMUM_SECONDS} s are needed")
    T = round(SECONDS * sample_rate_hz)
    ecg = nan_to_zero(ecg[:, :T].astype(np.float64))
    is_flat = np.ptp(ecg) == 0
    if filter == "ecgfounder":
        ecg = ecgfounder_filter(ecg, sample_rate_hz)
    elif filter != "none":
        raise UsageError(f"filter {filter!r}: expected 'none' or 'ecgfounder'")
    if normalize == "zscore":
        # A flat record stays flat: its deviation is rounding.
        deviation = 1.0 if is_flat else ecg.std()
        ecg = (ecg - ecg.mean()) / deviation
    elif normalize != "none":
        raise UsageError(f"normalize {normalize!r}: expected 'zscore' or 'none'")
    return np.pad(ecg, ((0, 0), (0, T - ecg.shape[1]))).astype(np.float32)


def ecgfounder_filter(ecg: np.ndarray, sample_rate_hz: float) -> np.ndarray:
    """ECGFounder's data loader: notch, band-pass (zero-phase), median baseline; (L, T) float64."""
    signal = import_optional("scipy.signal", "filtering")
    nyquist_hz = sample_rate_hz / 2
    if nyquist_hz > 50:  # at 100 Hz there is nothing left at 50 Hz to notch
        b, a = signal.iirnotch(50, 30, sample_rate_hz)
        ecg = signal.filtfilt(b, a, ecg)
    band_hz = [0.67, min(40, 0.99 * nyquist_hz)]
    band_pass = signal.butter(4, band_hz, "bandpass", fs=sample_rate_hz, output="sos")
    ecg = signal.sosfiltfilt(band_pass, ecg)
    width = 2 * round(0.2 * sample_rate_hz) + 1  # 0.4 s
    baseline = np.stack([signal.medfilt(lead, width) for lead in ecg])  # (L, T)
    return ecg - baseline


# --------------------------------------------------------------------------------------------------
# Records: lists of ECGs on disk
# --------------------------------------------------------------------------------------------------


class Collection(NamedTuple):
    """One list of records, whole: what splits and --limit choose from, and what is cached."""

    kind: str  # "ptb-xl", "mimic-iv-ecg", "wfdb" or "synthetic"
    root: str  # its folder; of synthetic records the seed
    paths: np.ndarray  # (N,) bytes below the root, without .hea; of synthetic records their numbers


TRAINING_FOLD = 11  # of records that neither validate nor test
RECORD_COLUMNS = ("collection", "row", "patients", "folds", "labels")


@dataclasses.dataclass(frozen=True)
class Records:
    """Records of one or more collections, as columns; records[rows] is a part, a + b both.

    Columns keep 800,035 records of MIMIC-IV-ECG in about 80 MB.
    """

    collections: tuple[Collection, ...]
    collection: np.ndarray  # (N,) int16, index into collections
    row: np.ndarray  # (N,) int64, the record's row in its collection's whole list
    patients: np.ndarray  # (N,) int64; unknown patients are negative and all different
    folds: np.ndarray  # (N,) int8, 1 to 10; 0 where there are none; TRAINING_FOLD
    labels: np.ndarray  # (N, 44) uint8 in the order of STATEMENTS; all 0 where there are none

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, rows) -> "Records":
        columns = {name: getattr(self, name)[rows] for name in RECORD_COLUMNS}
        return Records(self.collections, **columns)

    def __add__(self, other: "Records") -> "Records":
        collection = other.collection + len(self.collections)
        other = dataclasses.replace(other, collection=collection)
        columns = {}
        for name in RECORD_COLUMNS:
            columns[name] = np.concatenate([getattr(self, name), getattr(other, name)])
        return Records(self.collections + other.collections, **columns)

    def name(self, i: int) -> str:
        """The record's path, or synthetic:seed/number."""
        kind, root, paths = self.collections[self.collection[i]]
        path = os.fsdecode(paths[self.row[i]])
        if kind == "synthetic":
            return f"synthetic:{root}/{path}"
        return os.path.join(root, path)

    def read(self, i: int, leads: Sequence[str] = LEADS, sample_rate_hz: float = 500) -> np.ndarray:
        """(len(leads), T) float32 mV; errors as `read_ecg`."""
        kind, root, _ = self.collections[self.collection[i]]
        if kind == "synthetic":
            synthesize = import_synthetic().synthesize
            number = int(self.row[i])
            one = synthesize(1, int(root), first=number, leads=leads, sample_rate_hz=sample_rate_hz)
            return one[0][0]
        return read_ecg(self.name(i), leads, sample_rate_hz)

    def patient_keys(self) -> np.ndarray:
        """(N,) int64, different for patients of different collections too."""
        return self.patients + self.collection.astype(np.int64) * 10**12


def import_synthetic():
    """extras/synthetic.py, or the sentence that says what is missing."""
    synthetic = import_extra("synthetic")
    if synthetic is None:
        raise UsageError(
            "synthetic ECG needs extras/synthetic.py, which is not here; give --data a folder"
        )
    return synthetic


def find_records(data: str, *, sample_rate_hz: float = 500, seed: int = 0) -> Records:
    """The records of a collection; no signal is read yet.

    data: the folder of PTB-XL (ptbxl_database.csv; records100/ at 100 Hz and below, else
    records500/), of MIMIC-IV-ECG (record_list.csv), any folder of WFDB records, or "synthetic:N"
    (drawn from `seed`).  A record that is listed but missing shows when it is read.
    UsageError says what was looked for, and where.
    """
    if data.startswith("synthetic:"):
        return find_synthetic(data, seed)
    root = Path(os.path.abspath(data))  # the cache is named by it
    if not root.is_dir():
        raise UsageError(f"{data}: no such folder; give a folder of records or synthetic:N")
    if (root / "ptbxl_database.csv").is_file():
        return find_ptbxl(root, sample_rate_hz)
    if (root / "record_list.csv").is_file():
        return find_mimic(root)
    return find_wfdb(root)


def as_records(kind: str, root, paths, patients=None, folds=None, labels=None) -> Records:
    """One collection, whole; unknown patients and folds get the values that `Records` gives."""
    n = len(paths)
    if patients is None:
        patients = -1 - np.arange(n)
    if folds is None:
        folds = np.zeros(n)
    if labels is None:
        labels = np.zeros((n, len(STATEMENTS)), np.uint8)
    paths = np.array([os.fsencode(path) for path in paths], "S")
    return Records(
        (Collection(kind, str(root), paths),),
        np.zeros(n, np.int16),
        np.arange(n),
        np.asarray(patients, np.int64),
        np.asarray(folds, np.int8),
        labels,
    )


def find_synthetic(data: str, seed: int) -> Records:
    """synthetic:N; record i lies in fold i % 10 + 1."""
    count = data.removeprefix("synthetic:")
    if not count.isdecimal() or not 0 < int(count) <= 10**7:
        raise UsageError(f"--data {data}: expected up to 10,000,000 records, e.g. synthetic:20000")
    numbers = np.arange(int(count))
    _, labels = import_synthetic().synthesize(len(numbers), seed, leads=())  # (N, 44)
    return as_records("synthetic", seed, numbers.astype(str), numbers, numbers % 10 + 1, labels)


def find_ptbxl(root: Path, sample_rate_hz: float) -> Records:
    """PTB-XL 1.0.1 or 1.0.3; a statement counts at any likelihood, as in its own benchmark."""
    file = root / "ptbxl_database.csv"
    is_low = sample_rate_hz <= 100 and (root / "records100").is_dir()
    path_column = "filename_lr" if is_low else "filename_hr"
    table = read_table(file, ["patient_id", "scp_codes", "strat_fold", path_column])
    index = {statement: k for k, statement in enumerate(STATEMENTS)}
    labels = np.zeros((len(table), len(STATEMENTS)), np.uint8)
    for i, text in enumerate(table["scp_codes"]):
        try:
            codes = dict(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError, MemoryError) as error:
            raise UsageError(f"{file}, row {i + 1}: scp_codes is {text!r}, not a dict") from error
        for code in codes:
            if code in index:
                labels[i, index[code]] = 1
    patients = patient_numbers(table["patient_id"], file)
    folds = whole_numbers(table["strat_fold"], file, 1, 10)
    paths = record_paths(table[path_column], file)
    return as_records("ptb-xl", root, paths, patients, folds, labels)


def find_mimic(root: Path) -> Records:
    """MIMIC-IV-ECG: one list, without folds and labels."""
    file = root / "record_list.csv"
    table = read_table(file, ["path", "subject_id"])
    paths = record_paths(table["path"], file)
    return as_records("mimic-iv-ecg", root, paths, patient_numbers(table["subject_id"], file))


def read_table(file: Path, columns: list[str]):
    """These columns of a csv file as a pandas table of text, NaN where a cell is empty."""
    pandas = import_optional("pandas", "reading lists of records")
    try:
        # index_col=False: a comma more in the rows than in the header would shift the columns.
        table = pandas.read_csv(file, usecols=columns, dtype=str, index_col=False)
    except ValueError as error:  # pandas' own kinds among them: no such column, a row too long
        raise UsageError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from error
    if not len(table):
        raise UsageError(f"{file}: lists no record")
    return table


def whole_numbers(column, file: Path, low: int, high: int) -> np.ndarray:
    """A column of text as (N,) int64; spreadsheets write 3.0 for 3."""
    pandas = import_optional("pandas", "reading lists of records")
    numbers = pandas.to_numeric(column, errors="coerce").to_numpy(np.float64)
    is_right = (numbers >= low) & (numbers <= high) & (numbers == np.round(numbers))  # not NaN
    if not is_right.all():
        i = int(np.argmin(is_right))
        expected = f"not a whole number from {low} to {high}"
        raise UsageError(f"{file}, row {i + 1}: {column.name} is {column.iloc[i]!r}, {expected}")
    return numbers.astype(np.int64)


def patient_numbers(column, file: Path) -> np.ndarray:
    """(N,) int64; an empty cell is a patient of its own, with a negative number."""
    unknown = column.isna().to_numpy()
    numbers = whole_numbers(column.where(~unknown, "0"), file, 0, 10**12)
    numbers[unknown] = -1 - np.flatnonzero(unknown)
    return numbers


def record_paths(column, file: Path) -> list[str]:
    """Paths below the file's folder, without .hea."""
    paths = {}
    for i, path in enumerate(column):
        if not isinstance(path, str):
            raise UsageError(f"{file}, row {i + 1}: {column.name} is empty")
        if path.startswith("/") or ".." in path.split("/"):
            raise UsageError(f"{file}, row {i + 1}: {path} lies outside the collection's folder")
        path = path.removesuffix(".hea")
        if path in paths:
            raise UsageError(f"{file}, row {i + 1}: {path} is listed before, in row {paths[path]}")
        paths[path] = i + 1
    return list(paths)


def find_wfdb(root: Path) -> Records:
    """Every record in or below a folder that has no list of its own."""
    lists = {"ptbxl_database.csv", "record_list.csv"}
    is_part = any((above / name).is_file() for above in list(root.parents)[:4] for name in lists)
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        if is_part or lists & set(files):
            raise UsageError(
                f"{root}: a part of a collection, or more than one: give the folder of its "
                "ptbxl_database.csv or record_list.csv"
            )
        headers = [Path(folder, file) for file in sorted(files) if file.endswith(".hea")]
        segments = {name for header in headers for name in segment_names(header)}
        for header in headers:
            if header.stem not in segments:
                found.append(str(header.relative_to(root)).removesuffix(".hea"))
    if not found:
        raise UsageError(f"{root}: no ptbxl_database.csv, record_list.csv or .hea file in it")
    return as_records("wfdb", root, found)


def segment_names(header: Path) -> list[str]:
    """The records that a master header joins to one recording; of a plain header none."""
    try:
        lines = header.read_text(errors="replace").splitlines()
    except OSError:  # such as a link to nowhere: reading the record says so
        return []
    lines = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    if not lines or "/" not in lines[0][0]:  # "name/3 12 500 15000" has three segments
        return []
    return [line[0] for line in lines[1:]]


# --------------------------------------------------------------------------------------------------
# Self-cut pairs: lead I and all twelve leads of one record, Eq. (1)
# --------------------------------------------------------------------------------------------------


def self_cut(multi, lead: str = "I"):
    """Eq. (1): the pair (S, M) of one record, S = M[lead] with nothing else changed.

    multi: (..., 12, T) array or tensor with its leads in the order of LEADS.
    Returns ((..., 1, T), (..., 12, T)).
    """
    if multi.ndim < 2 or multi.shape[-2] != len(LEADS):
        raise UsageError(
            f"an array of shape {tuple(multi.shape)}: expected (..., 12 leads, samples)"
        )
    i = lead_index(lead)
    return multi[..., i : i + 1, :], multi


class SelfCuttingDataset(Dataset):
    """Item i is the S-M pair of record i, each view preprocessed on its own: (1, T) and (12, T).

    records: `Records` (see find_records), a list of WFDB paths, or an array (N, L, T) in mV at
        sample_rate_hz whose rows are named by `leads` (an array does not say which row is which
        lead: MIMIC-IV-ECG has aVF before aVL).
    lead: the single lead; "all" makes S the twelve leads too.
    multi: False reads and returns S alone, with an empty tensor in place of M.
    preprocessing: keyword arguments of `preprocess`.
    Items are float32 tensors.  RecordError names a record that cannot be read, is too short, lacks
    a lead, or is flat in a view.
    """

    def __init__(
        self,
        records,
        lead: str = "I",
        *,
        leads: str | Sequence[str] | None = None,
        sample_rate_hz: float = 500,
        multi: bool = True,
        **preprocessing,
    ) -> None:
        self.records = records
        self.lead = lead if lead == "all" else LEADS[lead_index(lead)]
        self.sample_rate_hz = sample_rate_hz
        self.multi = multi
        self.preprocessing = preprocessing
        self.leads_to_read = LEADS if multi or lead == "all" else (self.lead,)
        self.is_array = isinstance(records, (np.ndarray, torch.Tensor))
        if self.is_array:
            self.rows = self.array_rows(lead_names(leads or ()))
        elif not isinstance(records, Records):
            is_one_path = isinstance(records, (str, os.PathLike))
            items = [] if is_one_path else list(records)
            wrong = [item for item in items if not isinstance(item, (str, os.PathLike))]
            if is_one_path or wrong:
                kind = type((wrong or [records])[0]).__name__
                raise UsageError(f"records of type {kind}: give a list of paths, or one array")

    def array_rows(self, names: tuple[str, ...]) -> list[int]:
        """Where the leads to read stand in an array whose rows are called `names`."""
        if self.records.ndim != 3 or len(names) != self.records.shape[1]:
            raise UsageError(
                f"an array of shape {tuple(self.records.shape)} and {len(names)} names: expected "
                "(records, leads, samples), and in leads= a name for each lead, e.g. LEADS"
            )
        upper = [name.upper() for name in names]
        missing = [lead for lead in self.leads_to_read if lead.upper() not in upper]
        if missing:
            raise UsageError(f"no lead {', '.join(missing)} among the rows {', '.join(names)}")
        return [upper.index(lead.upper()) for lead in self.leads_to_read]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        ecg, name = self.read(i)  # (L, T) mV
        single_ecg = ecg
        if len(ecg) > 1 and self.lead != "all":
            single_ecg, _ = self_cut(ecg, self.lead)  # Eq. (1)
        single = self.prepare(single_ecg, name)
        if not self.multi:
            return single, torch.empty(0)
        return single, self.prepare(ecg, name)

    def read(self, i: int) -> tuple[np.ndarray, str]:
        """Record i, (L, T) in mV, and what to call it."""
        if isinstance(self.records, Records):
            ecg = self.records.read(i, self.leads_to_read, self.sample_rate_hz)
            return ecg, self.records.name(i)
        if self.is_array:
            return np.asarray(self.records[i])[self.rows], f"record {i}"
        ecg = read_ecg(self.records[i], self.leads_to_read, self.sample_rate_hz)
        return ecg, str(self.records[i])

    def prepare(self, ecg: np.ndarray, name: str) -> torch.Tensor:
        """`preprocess` of one view, refusing what carries no signal."""
        try:
            view = preprocess(ecg, sample_rate_hz=self.sample_rate_hz, **self.preprocessing)
        except RecordError as error:
            raise RecordError(f"{name}: {error}") from error
        # Looked for before filter and padding, which would hide it.
        span = np.ptp(nan_to_zero(ecg)[:, : view.shape[1]], axis=1)  # (L,)
        if not span.any():
            what = f"lead {self.lead}" if len(ecg) == 1 else "every lead"
            raise RecordError(f"{name}: {what} is flat or has no valid sample")
        return torch.from_numpy(view)


# --------------------------------------------------------------------------------------------------
# Loss: Eq. (3) and its variants
# --------------------------------------------------------------------------------------------------


def pair_logits(
    single: torch.Tensor, multi: torch.Tensor, scale, normalize: bool, offset: int
) -> torch.Tensor:
    """scale times the similarity of every S with every M: (B, D), (N, D) -> (B, N).

    In float32 at least, since half precision costs 3e-3 of the loss, with autocast off.
    """
    for embeddings in (single, multi):
        if not isinstance(embeddings, torch.Tensor):
            raise UsageError(f"embeddings of type {type(embeddings).__name__}: give torch tensors")
    B, N = len(single), len(multi)
    same_width = single.ndim == multi.ndim == 2 and single.shape[1] == multi.shape[1]
    if not same_width or B == 0 or not 0 <= offset <= N - B:
        shapes = f"{tuple(single.shape)} and {tuple(multi.shape)}"
        raise UsageError(
            f"embeddings of shape {shapes}: expected (B, D) and (N, D), partners from {offset} on"
        )
    dtype = torch.promote_types(single.dtype, multi.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast(single.device.type, enabled=False):
        single = single.to(dtype)
        multi = multi.detach().to(dtype)  # stopgrad of Eq. (2): f_m is frozen
        if normalize:
            single = F.normalize(single, dim=-1)
            multi = F.normalize(multi, dim=-1)
        return scale * (single @ multi.T)  # (B, N)


def siglip_loss(
    single: torch.Tensor,
    multi: torch.Tensor,
    *,
    scale: float | torch.Tensor = 1 / 0.07,
    bias: float | torch.Tensor = 0.0,
    normalize: bool = True,
    offset: int = 0,
) -> torch.Tensor:
    """Eq. (3): each pair is a yes-or-no question; summed over a row, averaged over rows.

    single: (B, D) embeddings of lead I.  multi: (N, D), N >= B, embeddings of twelve leads; record
    i's partner is row offset + i.  Returns a scalar.  With W processes each passes its own B rows
    of `single` and all N = W B rows of `multi`: the mean over processes is then Eq. (3) of the
    whole batch, gradients included.

    The paper prints "inner product x 0.07".  A normalised product times 0.07 cannot fall below 84.3
    at batch 128, where Table 5 reports 0.63, so the default is cosine / 0.07; b = 0 as published.
    `bias` is added to the logits, so it is -b of Eq. (3).
    """
    logits = pair_logits(single, multi, scale, normalize, offset) + bias  # (B, N)
    sign = torch.full_like(logits, -1)  # z_ij of Eq. (3): -1 for strangers,
    sign.diagonal(offset).fill_(1)  # and +1 for the record's own M
    return -F.logsigmoid(sign * logits).sum() / len(single)  # Eq. (3)


def softmax_loss(
    single: torch.Tensor,
    multi: torch.Tensor,
    *,
    scale: float | torch.Tensor = 1 / 0.07,
    offset: int = 0,
) -> torch.Tensor:
    """InfoNCE, for comparison: cross-entropy of cosine * scale over a row.  As siglip_loss else."""
    logits = pair_logits(single, multi, scale, True, offset)  # (B, N)
    partners = torch.arange(offset, offset + len(single), device=logits.device)  # (B,)
    return F.cross_entropy(logits, partners)


LOSSES = ("paper", "learnable", "raw", "softmax")


class SelfMIS(nn.Module):
    """The single-lead encoder f_s together with its loss: what pre-training trains.

    loss_name: "paper" (cosine / 0.07, b = 0); "learnable" (logits = exp(log_scale) cosine + bias,
    from 10 and -10, parameters of this module so that data-parallel processes agree on them);
    "raw" (inner product x 0.07, the paper's words taken literally); "softmax" (InfoNCE).
    """

    def __init__(self, encoder: ResNet1D, loss_name: str = "paper") -> None:
        super().__init__()
        if loss_name not in LOSSES:
            raise UsageError(f"loss {loss_name!r}: expected one of {', '.join(LOSSES)}")
        self.encoder = encoder
        self.loss_name = loss_name
        if loss_name == "learnable":
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
            self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, single_ecg, multi_embedding, offset: int = 0) -> torch.Tensor:
        """Eq. (2), then the loss.  single_ecg: (B, 1, T); multi_embedding: (N, D) of frozen f_m."""
        return self.loss(self.encoder(single_ecg), multi_embedding, offset)

    def loss(self, single, multi, offset: int = 0) -> torch.Tensor:
        """The loss of embeddings (B, D) and (N, D)."""
        if self.loss_name == "softmax":
            return softmax_loss(single, multi, offset=offset)
        if self.loss_name == "learnable":
            scale = self.log_scale.exp()
            return siglip_loss(single, multi, scale=scale, bias=self.bias, offset=offset)
        if self.loss_name == "raw":
            return siglip_loss(single, multi, scale=0.07, normalize=False, offset=offset)
        return siglip_loss(single, multi, offset=offset)


# --------------------------------------------------------------------------------------------------
# Metrics: by hand, exact with ties, on whole sets
# --------------------------------------------------------------------------------------------------


def as_array(values) -> np.ndarray:
    """A tensor or a sequence as a NumPy array, which has no bfloat16."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.to(torch.promote_types(values.dtype, torch.float32))
    return np.asarray(values)


def check_scores(y, score) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool and scores as float arrays of one shape, without NaN."""
    y, score = as_array(y), as_array(score)
    if y.shape != score.shape or not y.size:
        raise UsageError(f"labels of shape {y.shape} and scores of shape {score.shape} do not fit")
    odd = y[~np.isin(y, (0, 1))]
    if odd.size:
        raise UsageError(f"labels must be 0 or 1; found {odd[0]}")
    missing = np.isnan(score).sum()
    if missing:
        raise UsageError(f"{missing} of {score.size} scores are NaN")
    return y.astype(bool), score


def weighted_auc(y: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC of one class under R weightings of its records at once, ties counting half.

    y: (N,) bool.  score: (N,).  weights: (R, N), how often each record counts.
    Returns (R,); NaN where a weighting leaves no positive or no negative.
    """
    order = np.argsort(score, kind="stable")
    y, score = y[order], score[order]
    weights = weights[:, order].astype(np.float64)  # (R, N)
    # Equal scores form a run, and within a run nobody is before anybody.
    run_ends = np.append(np.flatnonzero(score[1:] != score[:-1]), len(score) - 1)
    all_so_far = np.cumsum(weights, axis=1)[:, run_ends]  # (R, runs)
    positives_so_far = np.cumsum(weights * y, axis=1)[:, run_ends]
    positives = np.diff(positives_so_far, prepend=0)
    negatives = np.diff(all_so_far - positives_so_far, prepend=0)
    negatives_below = np.cumsum(negatives, axis=1) - negatives
    right = (positives * (negatives_below + negatives / 2)).sum(axis=1)  # pairs in right order
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return np.where(pairs > 0, right / np.maximum(pairs, 1), np.nan)


def roc_auc(y, score) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order.

    y: (N,) of 0 and 1.  score: (N,), higher = more likely 1; give float32 logits (a half-precision
    sigmoid makes ties, which count half).  From 0 to 1; NaN if a class is absent.
    UsageError: other shapes, other labels, NaN among the scores.
    """
    y, score = check_scores(y, score)
    if y.ndim != 1:
        raise UsageError(f"labels of shape {y.shape}: expected (N,); macro_auc takes (N, K)")
    return float(weighted_auc(y, score, np.ones((1, len(y))))[0])


def macro_auc(y, score) -> tuple[float, np.ndarray]:
    """(mean AUC over the classes with positives and negatives, AUC of each class (K,), else NaN).

    y, score: (N, K).  Compute it once on a whole set: a mean over batches or processes is another
    number.
    """
    y, score = check_scores(y, score)
    if y.ndim != 2:
        raise UsageError(f"labels of shape {y.shape}: expected (N, K)")
    each = np.array([roc_auc(y[:, k], score[:, k]) for k in range(y.shape[1])])
    if not np.isfinite(each).any():
        return math.nan, each
    return float(np.nanmean(each)), each


def bootstrap_auc(y, score, groups=None, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """AUC of every class in `draws` resamples of whole groups, (draws, K); NaN for an absent class.

    y, score: (N, K).  groups: (N,), one value a patient; None: each record is one.
    `interval(draws[:, k])` is the interval of class k, `interval(np.nanmean(draws, 1))` that of
    macro_auc's mean.  Which records are drawn depends on (y, groups, seed) alone, so the difference
    of two results on one test set is a paired bootstrap.
    """
    y, score = check_scores(y, score)
    if y.ndim != 2:
        raise UsageError(f"labels of shape {y.shape}: expected (N, K)")
    if groups is None:
        groups = np.arange(len(y))
    if len(groups) != len(y):
        raise UsageError(f"labels of shape {y.shape} with {len(groups)} groups: expected one each")
    present = np.flatnonzero(y.any(0) & ~y.all(0))
    weights = draw_groups(y[:, present], as_array(groups), draws, seed)  # (R, N)
    auc = np.full((draws, y.shape[1]), np.nan)
    for k in present:
        for rows in np.array_split(np.arange(draws), max(1, draws // 100)):  # bounds the memory
            auc[rows, k] = weighted_auc(y[:, k], score[:, k], weights[rows])
    return auc


def draw_groups(y: np.ndarray, groups: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How often each record is drawn, (R, N) float32, when whole groups are drawn with replacement.

    A draw that leaves a class of y (N, K) without a positive or a negative is drawn again, as long
    as there is hope: with many classes of one positive the last draws stay incomplete.
    """
    rng = np.random.default_rng(seed)
    _, group_of = np.unique(groups, return_inverse=True)  # (N,)
    G = group_of.max() + 1
    weights = np.empty((draws, len(y)), np.float32)
    done = 0
    for _ in range(draws):
        drawn = rng.multinomial(G, np.full(G, 1 / G), size=64)  # (64, G)
        drawn = drawn[:, group_of].astype(np.float32)  # (64, N)
        positives = drawn @ y  # (64, K)
        is_complete = (positives > 0) & (positives < drawn.sum(1, keepdims=True))
        kept = drawn[is_complete.all(1)][: draws - done]
        weights[done : done + len(kept)] = kept
        done += len(kept)
        if done == draws:
            return weights
    drawn = rng.multinomial(G, np.full(G, 1 / G), size=draws - done)
    weights[done:] = drawn[:, group_of]
    return weights


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (low, high) of bootstrap draws (R,) of one number; NaN if a draw is."""
    values = np.asarray(values)
    if values.ndim != 1:
        raise UsageError(f"draws of shape {values.shape}: expected (R,), those of one number")
    if not np.isfinite(values).all():
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@torch.no_grad()
def retrieval(
    single: torch.Tensor, multi: torch.Tensor, k: Sequence[int] = (1, 5, 10), chunk: int = 1024
) -> dict[int, float]:
    """R@k in percent: how often record i's own M is among the k nearest (cosine) of S_i.

    single, multi: (N, D).  Ties count against it.  Memory is bounded by chunk x N.
    UsageError: other shapes, k > N, values that are not finite.
    """
    single, multi = torch.as_tensor(single), torch.as_tensor(multi)
    N = len(single)
    if single.ndim != 2 or single.shape != multi.shape or N == 0:
        shapes = f"{tuple(single.shape)} and {tuple(multi.shape)}"
        raise UsageError(f"embeddings of shape {shapes}: expected (N, D) twice")
    if not all(1 <= n <= N for n in k):
        raise UsageError(f"k = {', '.join(map(str, k))} of {N} records: expected 1 to {N}")
    single = single.to(torch.promote_types(single.dtype, torch.float32))
    multi = multi.to(single.dtype)
    if not (torch.isfinite(single).all() and torch.isfinite(multi).all()):
        raise UsageError("embeddings hold NaN or infinity")
    single = F.normalize(single, dim=-1)
    multi = F.normalize(multi, dim=-1)
    others_as_near = []
    for i in range(0, N, chunk):
        cosine = single[i : i + chunk] @ multi.T  # (chunk, N)
        own = cosine.diagonal(i)[:, None]
        # Columns that are equal differ by rounding, hence the 1e-6; the record itself is one.
        others_as_near.append((cosine >= own - 1e-6).sum(1) - 1)
    rank = torch.cat(others_as_near)  # (N,)
    return {n: 100 * float((rank < n).double().mean()) for n in k}


@torch.no_grad()
def embed(encoder: ResNet1D, signals: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Eq. (2) for a whole set: signals (N, L, T) -> embeddings (N, D), float32 on the CPU.

    Computed in float32, in chunks that are padded to one size, because the last bit of a
    convolution may depend on how many records it sees.
    """
    signals = torch.as_tensor(signals)
    chunk = 128 if device.type == "cuda" else 32
    embeddings = [torch.empty(0, encoder.embedding_dim)]
    for i in range(0, len(signals), chunk):
        x = signals[i : i + chunk].to(device, torch.float32)  # (n, L, T)
        n = len(x)
        x = F.pad(x, (0, 0, 0, 0, 0, chunk - n))  # (chunk, L, T)
        embeddings.append(encoder(x)[:n].float().cpu())
    return torch.cat(embeddings)


# --------------------------------------------------------------------------------------------------
# Runs: what both scripts need (settings, processes, a run's folder, the pass over the records)
# --------------------------------------------------------------------------------------------------


def flag(default, help: str, **options):
    """A field of a settings dataclass that is a command-line flag too; `options` go to argparse."""
    metadata = {"help": help, **options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


POSITIVE = "limit sample_rate epochs batch_size lr val_records seeds patience".split()
NOT_NEGATIVE = "seed workers warmup weight_decay save_seconds".split()


@dataclasses.dataclass
class Config:
    """Settings that both scripts share.  None means: follows from the data or the checkpoint.

    A script adds its own, `out`, `batch_size` and `lr` among them, and what it does without --data:
    `demonstration()`, other defaults, and `demonstrates`, how to call it.
    """

    data: list[str] = flag(
        [],
        "folder of PTB-XL, MIMIC-IV-ECG or any WFDB records, or synthetic:N; repeat it to mix "
        "(default: a demonstration on synthetic ECG)",
        action="append",
        metavar="ROOT",
    )
    limit: int | None = flag(None, "use the first N records of each collection", metavar="N")
    lead: str | None = flag(None, "the single lead, or all (default: the checkpoint's, else I)")
    size: str | None = flag(None, "of a random encoder (default: ecgfounder)", choices=tuple(SIZES))
    sample_rate: float | None = flag(None, "in Hz (default: the checkpoint's, else 500)")
    normalize: str | None = flag(
        None, "default: the checkpoint's, else zscore", choices=("zscore", "none")
    )
    filter: str | None = flag(
        None, "default: the checkpoint's, else none", choices=("none", "ecgfounder")
    )
    val_fold: int = flag(9, "fold that chooses the best epoch", choices=range(1, 11))
    test_fold: int = flag(10, "fold of the final number", choices=range(1, 11))
    epochs: int = flag(20, "passes over the training records")
    amp: str = flag(
        "auto",
        "mixed precision; auto: bf16 where GPU or CPU have it, fp16 on other GPUs, else off",
        choices=("auto", "bf16", "fp16", "off"),
    )
    workers: int | None = flag(None, "processes that read records (default: the cores)")
    cache: str | None = flag(None, "folder, or none (default: cache beside OUT)", metavar="DIR")
    seed: int = flag(0, "of weights and order")
    resume: bool = flag(False, "go on from OUT/last.pt; start where there is none")
    overwrite: bool = flag(False, "replace the run in OUT")
    strict: bool = flag(False, "stop at the first unusable record instead of leaving it out")
    debug: bool = flag(False, "show the traceback of an error")
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    compile: bool = flag(False, "torch.compile the encoder; needs a C compiler")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in POSITIVE and value is not None and not value > 0:
                raise UsageError(f"{as_flag(name)} {value}: expected a number above 0")
            if name in NOT_NEGATIVE and value is not None and not 0 <= value < 2**63:
                raise UsageError(f"{as_flag(name)} {value}: expected 0 or more")
            if value == math.inf or value == "" or value == [""]:
                raise UsageError(f"{as_flag(name)} {value}: give a value")
        if self.sample_rate is not None and not 20 <= self.sample_rate <= 2000:
            raise UsageError(f"--sample-rate {self.sample_rate}: expected 20 to 2000 Hz")
        if self.lead not in (None, "all"):
            self.lead = LEADS[lead_index(self.lead)]
        if self.val_fold == self.test_fold:
            raise UsageError(f"--val-fold and --test-fold are both {self.test_fold}: give two")
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite: choose one")


def as_flag(name: str) -> str:
    """A field of the settings as somebody would type it."""
    return "--" + name.replace("_", "-")


def is_empty(value) -> bool:
    """Whether a setting says nothing: None, False or []; a 0 says something."""
    return value is None or value is False or value == []


def as_flags(settings: dict) -> str:
    """Settings as somebody would type them."""
    words = []
    for name, value in settings.items():
        if is_empty(value):
            words.append(f"no {as_flag(name)}")
        elif value is True:
            words.append(as_flag(name))
        else:
            values = value if isinstance(value, list) else [value]
            words.append(" ".join([as_flag(name), *map(str, values)]))
    return " ".join(words)


def parse_flags(config_class, description: str, argv: Sequence[str] | None = None) -> Config:
    """The settings of a command line; --help shows every default; abbreviations are refused."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=layout
    )
    defaults = config_class()
    shared = parser.add_argument_group("shared by both scripts")
    own = parser.add_argument_group("of this script")
    for field in dataclasses.fields(config_class):
        options = dict(field.metadata)
        default = getattr(defaults, field.name)
        if isinstance(default, bool):
            options["action"] = "store_true"
        else:
            kind, *_ = typing.get_args(field.type) or (field.type,)  # int of "int | None"
            options["type"] = kind
        if not is_empty(default):
            options["help"] += " (default: %(default)s)"
        group = shared if field.name in Config.__dataclass_fields__ else own
        group.add_argument(as_flag(field.name), default=default, **options)
    try:
        config = config_class(**vars(parser.parse_args(argv)))
        if not config.data:
            demonstration = config.demonstration()
            parser.set_defaults(**demonstration)  # flags that the user typed stay
            config = config_class(**vars(parser.parse_args(argv)))
            if os.environ.get("RANK", "0") == "0":
                used = {name: getattr(config, name) for name in demonstration}
                print(f"no --data, so this is {config.demonstrates}: {as_flags(used)}", flush=True)
    except UsageError as error:
        parser.error(str(error))
    return config


def run_script(main, config_class, description: str) -> None:
    """main(settings of the command line); a UsageError becomes one sentence and exit code 2."""
    config = parse_flags(config_class, description)
    environment()  # the revision that runs, not the one that is on disk when it saves
    try:
        main(config)
    except UsageError as error:
        if config.debug:
            raise
        sys.stdout.flush()
        # Out of a process that reads it comes as the last line of that process's traceback.
        sentence = re.sub(r"^selfmis\.\w+: ", "", str(error).strip().splitlines()[-1])
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(2)  # at once: the end of a process group may wait for the others
    except torch.OutOfMemoryError:
        if config.debug:
            raise
        sys.stdout.flush()
        remedy = "lower --batch-size; more processes keep the global batch"
        print(f"error: the GPU's memory does not suffice; {remedy}", file=sys.stderr, flush=True)
        os._exit(2)
    except KeyboardInterrupt:
        sys.stdout.flush()
        remedy = "--resume goes on from the last save, if there was one"
        print(f"interrupted; {remedy}", file=sys.stderr, flush=True)
        os._exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may outlive the group and abort a Python that is torn down


class Ranks(NamedTuple):
    """Who this process is among all that torchrun started; without torchrun rank 0 of 1.

    One process under torchrun makes the same exchanges as many do, with itself.
    """

    rank: int
    world_size: int
    local_world_size: int  # processes on this machine
    device: torch.device
    barrier_group: object = None  # all processes; other exchanges end after half an hour

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_joined(self) -> bool:
        """Whether torchrun started it."""
        return self.barrier_group is not None

    def print(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        """Wait for all, for hours if need be: one may have to read a slower disk."""
        if self.is_joined:
            dist.barrier(group=self.barrier_group)

    def gather_objects(self, mine) -> list:
        """Everybody's `mine`, in the order of ranks, on every process."""
        if not self.is_joined:
            return [mine]
        everybody = [None] * self.world_size
        dist.all_gather_object(everybody, mine)
        return everybody

    def share(self, rows: np.ndarray) -> list[np.ndarray]:
        """This process's part of some rows, 256 at a time: every world_size-th, from rank on."""
        mine = rows[self.rank :: self.world_size]
        return [mine[i : i + 256] for i in range(0, len(mine), 256)]

    def gather_rows(self, mine: torch.Tensor, n: int) -> torch.Tensor:
        """What all processes have made of their `share` of n rows, in the order of the rows."""
        if not self.is_joined:
            return mine
        longest = math.ceil(n / self.world_size)
        padded = torch.zeros(longest, *mine.shape[1:], dtype=mine.dtype, device=self.device)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        # Everybody's row 0, everybody's row 1, ... without the padding: none twice, none lost.
        return torch.stack(parts, 1).flatten(0, 1)[:n].to(mine.device)


def join_ranks(device: str, seed: int) -> Ranks:
    """Set device, threads and seed; under torchrun join the other processes (nccl or gloo)."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus >= local_world_size else "cpu"
        if 0 < gpus < local_world_size and local_rank == 0:
            print(f"{local_world_size} processes but {gpus} GPU(s), so all compute on the CPU")
    if world_size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        # torchrun's own 1 would leave cores idle, beside a GPU too.
        torch.set_num_threads(max(1, available_cores() // local_world_size))
    if device == "cuda":
        if gpus < local_world_size:
            raise UsageError(
                f"--device cuda: {local_world_size} processes on this machine, but {gpus} GPUs; "
                "start fewer or give --device cpu"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # as on a CPU, even where a container has
        torch.set_float32_matmul_precision("highest")  # switched it on
    elif device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine or this build of torch has no Metal device")
    barrier_group = None
    if "WORLD_SIZE" in os.environ:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        # After a restart torchrun's store still has the addresses of the dead processes, so each
        # attempt gets names of its own.
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        # nccl and gloo would wait for each other in silence.
        store.set(f"device of {rank}", device.partition(":")[0])
        kinds = {store.get(f"device of {r}").decode() for r in range(world_size)}
        if len(kinds) > 1:
            raise UsageError(f"--device: processes have {' and '.join(sorted(kinds))}; give one")
        timeout = timedelta(minutes=30)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        barrier_group = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
    torch.manual_seed(seed)
    return Ranks(rank, world_size, local_world_size, torch.device(device), barrier_group)


def available_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


class InputSpec(NamedTuple):
    """How a record is shown to an encoder; it stands in every checkpoint."""

    lead: str  # a name of LEADS, or "all"
    sample_rate_hz: float
    preprocessing: dict  # keyword arguments of `preprocess`


def agree(name: str, asked, known: dict[str, object], default):
    """The one value that flag and checkpoints {path: value} state, else the default.

    UsageError if they state several.
    """
    stated = {source: value for source, value in known.items() if value is not None}
    if asked is not None:
        stated[as_flag(name)] = asked
    if len(set(stated.values())) > 1:
        each = ", ".join(f"{value} in {source}" for source, value in stated.items())
        raise UsageError(f"{name}: {each}; they must agree")
    return next(iter(stated.values()), default)


def resolve_input(config: Config, encoders: dict[str, ResNet1D], lead_from: dict) -> InputSpec:
    """Lead, rate and preprocessing on which the flags and encoders {path: encoder} agree.

    lead_from: those of the encoders whose own lead counts.
    """
    leads = {path: encoder.lead for path, encoder in lead_from.items()}
    rates = {path: encoder.sample_rate_hz for path, encoder in encoders.items()}
    stored = {path: encoder.preprocessing or {} for path, encoder in encoders.items()}
    preprocessing = {}
    for name, default in (("normalize", "zscore"), ("filter", "none")):
        known = {path: settings.get(name) for path, settings in stored.items()}
        preprocessing[name] = agree(name, getattr(config, name), known, default)
    lead = agree("lead", config.lead, leads, "I")
    rate_hz = agree("sample_rate", config.sample_rate, rates, 500)
    return InputSpec(lead, float(rate_hz), preprocessing)


def open_encoder(path: str, size: str | None, leads: int | None = None) -> ResNet1D | None:
    """`load_encoder` of a flag's value, of that size and number of leads; None for random."""
    if path == "random":
        return None
    encoder = load_encoder(path)
    if leads is not None and encoder.leads != leads:
        raise UsageError(f"{path}: an encoder of {encoder.leads} lead(s), but {leads} are needed")
    if size is not None and encoder.architecture | SIZES[size] != encoder.architecture:
        raise UsageError(f"--size {size}: {path} holds an encoder of another size")
    return encoder


def random_encoder(leads: int, size: str | None, like: ResNet1D | None = None) -> ResNet1D:
    """An untrained one: built like another encoder, or in the size that is asked for."""
    if like is None:
        return ResNet1D(leads, **SIZES[size or "ecgfounder"])
    shape = like.architecture | dict(leads=leads)
    return type(like)(**shape)


def gather_records(config: Config, rate_hz: float, stream: int) -> Records:
    """All collections of --data, each cut to --limit.

    stream: the seed of synthetic records, which keeps those of the two scripts apart.  Beside real
    records synthetic ones only train: they get a fold of their own.
    """
    places = []
    for data in config.data:  # synthetic:9 is the beginning of synthetic:20
        place = "synthetic" if data.startswith("synthetic:") else os.path.realpath(data)
        if place in places:
            raise UsageError(f"--data {data}: given twice; name it once")
        places.append(place)
    found = [find_records(data, sample_rate_hz=rate_hz, seed=stream) for data in config.data]
    is_synthetic = [records.collections[0].kind == "synthetic" for records in found]
    everything = None
    for i, records in enumerate(found):
        records = records[: config.limit]
        if is_synthetic[i] and not all(is_synthetic):
            folds = np.full_like(records.folds, TRAINING_FOLD)
            records = dataclasses.replace(records, folds=folds)
        everything = records if everything is None else everything + records
    return everything


def training_data(train: Records, val: Records, labels: bool) -> list[dict]:
    """Provenance, kept in every checkpoint: the records that trained, and those that chose."""
    entries = []
    for use, records in (("training", train), ("validation", val)):
        for c in np.unique(records.collection):
            kind, root, _ = records.collections[c]
            name = kind if kind in ("ptb-xl", "mimic-iv-ecg") else f"{kind}:{Path(root).name}"
            folds = records.folds[records.collection == c]  # of this collection's records
            known = [int(fold) for fold in np.unique(folds) if 1 <= fold <= 10]
            entry = dict(data=name, use=use, folds=known, labels=labels, records=len(folds))
            entries.append(entry)
    return entries


# ---- a run's folder ------------------------------------------------------------------------------

RUN_FILES = (  # config.json, by which a run is known, is removed last
    "log.jsonl last.pt best.pt probe.pt results.json results.md roc.png predictions.npz config.json"
).split()
# Settings that may change when a run goes on: they change what is printed or how fast it is, not
# what is computed but for rounding.  --amp is compared by what it comes to, --batch-size by the
# global batch.
FREE_ON_RESUME = (
    "amp batch_size compile compare out workers cache resume overwrite debug device strict "
    "save_seconds"
).split()


def launcher() -> str:
    """What all restarts by one torchrun have in common: the process that starts them."""
    return f"{platform.node()} {os.getppid()}"


def open_run(config: Config) -> Path:
    """The run's folder; UsageError where a run, or somebody else's file, would be lost.

    Nothing is written or removed: `begin_run` does that when all else has been checked.  Processes
    that torchrun restarts (on one machine) go on with the run that they had begun: their config
    becomes one with --resume.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file, not a folder")
    there = [name for name in RUN_FILES if (out / name).exists()]
    if not there:
        return out
    try:
        begun = json.loads((out / "config.json").read_text())
        script, launched_by, settings = begun["script"], begun["launcher"], begun["config"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"--out {out}: holds {there[0]} of no run; give another --out") from error
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and launched_by == launcher():
        config.resume, config.overwrite = True, False
    if not config.resume and not config.overwrite:
        raise UsageError(f"--out {out}: holds a run; give another, or --resume or --overwrite")
    if config.resume and script != type(config).__name__:
        raise UsageError(f"--resume: {out} is a run of the other script; give another --out")
    if config.resume:
        check_settings(config, settings, out)
    lost = [out.resolve()] + [out.resolve() / name for name in RUN_FILES]
    for name in ("single", "multi", "encoder", "compare"):
        value = getattr(config, name, None) or []
        paths = value if isinstance(value, list) else [value]
        for path in paths:
            if config.overwrite and Path(path).resolve() in lost:
                raise UsageError(f"{as_flag(name)} {path}: --overwrite would remove it first")
    return out


def begin_run(out: Path, config: Config, content: dict, ranks: Ranks) -> None:
    """Make the folder, remove the run that --overwrite replaces, and write config.json."""
    make_shared_folder(out, "--out", ranks)
    if ranks.is_main:
        for name in RUN_FILES:
            (out / name).unlink(missing_ok=True)
        settings = dict(config=dataclasses.asdict(config), script=type(config).__name__)
        settings |= dict(launcher=launcher(), device=ranks.device.type)
        write_json(out / "config.json", settings | content | environment())


def make_shared_folder(folder: Path, flag_name: str, ranks: Ranks) -> None:
    """UsageError if it cannot be made, or if not every machine sees the same one."""
    token = folder / f"{ranks.gather_objects(time.time_ns())[0]}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if ranks.is_main:
            token.touch()
    except OSError as error:
        raise UsageError(f"{flag_name} {folder}: {error.strerror}; give another") from error
    ranks.barrier()
    is_seen = ranks.gather_objects(token.exists())
    if ranks.is_main:
        token.unlink()
    if not all(is_seen):
        raise UsageError(f"{flag_name} {folder}: not every machine sees it; give a shared folder")


def read_last(config: Config, out: Path, ranks: Ranks) -> dict | None:
    """OUT/last.pt for --resume, None to start; UsageError if it does not fit the run."""
    if not config.resume:
        return None
    has_best, has_last = (out / "best.pt").exists(), (out / "last.pt").exists()
    if len(set(ranks.gather_objects((has_best, has_last)))) > 1:
        raise UsageError(f"--out {out}: not every machine sees it; give a shared folder")
    if not has_best and not has_last:
        ranks.print(f"--resume: there is no {out / 'last.pt'}, so the run starts")
        return None
    last = read_checkpoint(out / "last.pt")
    if "rows" not in last:
        raise UsageError(
            f"--resume: {out / 'last.pt'} is of another version; --overwrite starts anew"
        )
    if last["epoch"] > 0 and not has_best:
        raise UsageError(f"--resume: {out} has no best.pt any more; --overwrite starts anew")
    # Other processes may share a global batch, unless the loss compares those of one process.
    batch, world_size = last["config"]["batch_size"], last["world_size"]
    same = config.batch_size * ranks.world_size == batch * world_size
    if not same or (getattr(config, "local_negatives", False) and batch != config.batch_size):
        started = f"{out} was started with {world_size} processes x {batch} records"
        raise UsageError(f"--resume: {started}; keep the product, or both with --local-negatives")
    return last


def check_settings(config: Config, before: dict, out: Path) -> None:
    """UsageError if a run was started with other settings than those that may change."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, value in before.items():
        if name not in FREE_ON_RESUME and now.get(name) != value:
            was, is_now = as_flags({name: value}), as_flags({name: now.get(name)})
            raise UsageError(f"--resume: {out} was started with {was}, this is {is_now}")


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """A temporary file, then a rename: a kill or a full disk leaves the older file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from error


def save(path: Path, content: dict) -> None:
    """The one writer of checkpoints; read_checkpoint is the one reader."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def write_json(path: Path, content) -> None:
    """config.json and results.json."""
    write_atomically(path, json.dumps(nan_to_none(content), indent=1).encode() + b"\n")


def nan_to_none(content):
    """JSON has no NaN."""
    if isinstance(content, dict):
        return {key: nan_to_none(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [nan_to_none(value) for value in content]
    if isinstance(content, float) and math.isnan(content):
        return None
    return content


def append_log(out: Path, entry: dict) -> None:
    """One more line of log.jsonl; of equal epoch and step, as after a resume, the last counts."""
    try:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(nan_to_none(entry)) + "\n")
    except OSError as error:
        raise UsageError(f"{out / 'log.jsonl'}: cannot be written ({error.strerror})") from error


def encoder_content(encoder: ResNet1D, spec: InputSpec, seen: list[dict]) -> dict:
    """The part of every checkpoint that `load_encoder` reads."""
    weights = {key: value.detach().cpu() for key, value in encoder.state_dict().items()}
    content = dict(encoder=weights, architecture=encoder.architecture, training_data=seen)
    content["network"] = type(encoder).__name__
    return content | spec._asdict()


@functools.cache
def environment() -> dict:
    """Versions, git revision and hardware, beside the settings in config.json and checkpoints."""
    here = Path(__file__).resolve().parent
    git = None
    if (here / ".git").exists() and shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        git = subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = dict(python=platform.python_version(), torch=str(torch.__version__), git=git)
    return versions | dict(date=time.strftime("%Y-%m-%d"), gpu=gpu, cores=available_cores())


# ---- training ------------------------------------------------------------------------------------

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def choose_amp(amp: str, device: torch.device) -> str:
    """What --amp auto comes to here: bf16, fp16 or off."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp16"
    if device.type == "cpu" and cpu_has_bf16():
        return "bf16"
    return "off"


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies matrices of bf16 itself (AVX512-BF16 or AMX)."""
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch, which does not tell
        return False
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


class Learner:
    """A model (with an encoder in it), its optimizer, and the precision of its steps."""

    def __init__(self, model: nn.Module, optimizer, config: Config, ranks: Ranks) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = ranks.device
        self.amp = choose_amp(config.amp, self.device)
        kinds = sorted(set(ranks.gather_objects(self.amp)))
        if len(kinds) > 1:  # scaled gradients would be averaged with others
            raise UsageError(f"--amp auto: the processes have {' and '.join(kinds)}; give one")
        # fp16 needs its loss scaled, lest small gradients vanish; else the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        if config.compile:
            model.encoder.compile(mode="reduce-overhead")
        self.step_model = model  # what a training step calls
        if ranks.is_joined:
            devices = [self.device] if self.device.type == "cuda" else None
            self.step_model = nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def forward(self, *inputs) -> torch.Tensor:
        with torch.autocast(self.device.type, AMP_DTYPES[self.amp], enabled=self.amp != "off"):
            return self.step_model(*inputs)

    def update(self, loss: torch.Tensor) -> None:
        """One step down the gradient, averaged over processes, clipped to 1.0 (Table 7)."""
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self, *rows: np.ndarray) -> dict:
        """The part of last.pt that `restore` reads; rows: of the records that train and choose."""
        parts = dict(model=self.model, optimizer=self.optimizer, scaler=self.scaler)
        state = {name: part.state_dict() for name, part in parts.items()}
        return state | dict(amp=self.amp, rows=rows_digest(*rows))

    def restore(self, last: dict, *rows: np.ndarray) -> None:
        """Go back to where last.pt was written."""
        if last["amp"] != self.amp:
            raise UsageError(f"--resume: the run was started with --amp {last['amp']}; give that")
        if last["rows"] != rows_digest(*rows):
            raise UsageError("--resume: other records can be read now than at the start")
        self.model.load_state_dict(last["model"])
        self.optimizer.load_state_dict(last["optimizer"])
        self.scaler.load_state_dict(last["scaler"])


def rows_digest(*parts: np.ndarray) -> str:
    """Changes with every row of the parts."""
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(f"{len(rows)} rows".encode() + rows.tobytes())
    return digest.hexdigest()


def epoch_batches(rows: np.ndarray, config: Config, epoch: int, ranks: Ranks) -> list[np.ndarray]:
    """This process's part of every batch of an epoch, a function of (seed, epoch) alone.

    The incomplete last global batch is dropped.
    """
    B, W = config.batch_size, ranks.world_size
    order = rows[np.random.default_rng([config.seed, epoch]).permutation(len(rows))]
    steps = len(order) // (B * W)
    if steps == 0:
        batch = f"a batch of {W} x {B}"
        raise UsageError(f"{len(rows):,} records do not fill {batch}; lower --batch-size")
    return list(order[: steps * B * W].reshape(steps, W, B)[:, ranks.rank])


def cosine_lr(peak: float, step: int, steps: int, warmup: int = 0) -> float:
    """Learning rate of a step from 0: up in a line, then half a cosine from the peak to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ---- the pass: every record is read once ---------------------------------------------------------

CACHE_VERSION = 6  # raise it when read_ecg, preprocess or synthesize return something else
READ_BATCH = 128  # records that are read, embedded and written together


class CachedArray:
    """A file of float16 rows, one for each record of a collection, and which of them are there.

    The file is sparse.  A process appends the numbers of the rows that it has written to a list of
    its own, after the rows themselves: a kill in between or a lost list repeats rows and never
    leaves one out, and no two machines write into one list.
    """

    def __init__(self, folder: Path, name: str, key: list, shape: tuple[int, ...]) -> None:
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.path = folder / f"{name}-{digest}.f16"
        self.list_path = self.path.with_suffix(
            f".{platform.node()}-{os.getpid()}-{time.time_ns()}.rows"
        )
        self.shape = shape  # (N, ...)
        self.row_bytes = 2 * math.prod(shape[1:])

    def lists(self) -> list[Path]:
        return list(self.path.parent.glob(f"{self.path.stem}.*.rows"))

    def create(self) -> None:
        """An empty array in its final size (holes cost nothing), unless it is there already."""
        size = self.shape[0] * self.row_bytes
        if self.path.exists() and self.path.stat().st_size == size:
            return
        for list_path in self.lists():  # they speak of an array that has gone
            list_path.unlink()
        try:
            with open(self.path, "ab") as file:  # "wb" would empty one that another run has begun
                file.truncate(size)
        except OSError as error:
            raise self.write_error(error) from error

    def write_error(self, error: OSError) -> UsageError:
        """On a full disk; the next start finds what has been written."""
        remedy = "free space, or give another --cache; what is in it stays"
        return UsageError(f"{self.path}: the cache cannot be written ({error.strerror}): {remedy}")

    def is_done(self) -> np.ndarray:
        """(N,) bool: the rows that are there."""
        done = np.zeros(self.shape[0], bool)
        for list_path in self.lists():
            done[np.fromfile(list_path, np.int64)] = True
        return done

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(B, ...) float16."""
        return np.memmap(self.path, np.float16, "r", shape=self.shape)[rows]

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """By ordinary writes: on a full disk that is an error, where a memory map would crash."""
        try:
            with open(self.path, "r+b") as file:
                for row, value in zip(rows, values.astype(np.float16), strict=True):
                    file.seek(row * self.row_bytes)
                    file.write(value.tobytes())
            with open(self.list_path, "ab") as file:
                file.write(rows.astype(np.int64).tobytes())
        except OSError as error:
            raise self.write_error(error) from error


class ReadPair(NamedTuple):
    """What a reading process sends.  NumPy: tensors would take an open file each on their way."""

    row: int
    single: np.ndarray | None  # S, (L, T) float16, so that cached and direct pairs are alike
    multi: np.ndarray | None  # M, (12, T) float32
    problem: str | None  # why the record cannot be used; S and M are None then


class SkipUnreadable(Dataset):
    """A SelfCuttingDataset whose items are `ReadPair`s, of unusable records too."""

    def __init__(self, pairs: SelfCuttingDataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> ReadPair:
        try:
            single, multi = self.pairs[row]
        except RecordError as error:
            return ReadPair(row, None, None, str(error))
        return ReadPair(row, single.half().numpy(), multi.numpy(), None)


@dataclasses.dataclass
class Pairs:
    """What training reads: rows of (preprocessed lead, teacher embedding).

    Out of the cache, which keeps an array a collection, or straight from the records.
    """

    dataset: SelfCuttingDataset
    teacher: ResNet1D | None
    device: torch.device
    workers: int
    signals: list[CachedArray]  # (L, T) a row, one array a collection; none with --cache none
    targets: list[CachedArray]  # (D,) a row; none without a teacher
    usable: np.ndarray  # (N,) rows of the records that can be read
    unusable: list[str] = dataclasses.field(default_factory=list)  # why the others cannot

    def batches(self, rows_of_batches: Sequence[np.ndarray], with_targets: bool = True):
        """For each array of rows: signals (B, L, T) and embeddings (B, D) or None, float32."""
        with_targets = with_targets and self.teacher is not None
        if not self.signals:
            yield from self.read_batches(rows_of_batches, with_targets)
            return
        for rows in rows_of_batches:
            signals = self.on_device(self.read_cache(self.signals, rows))
            targets = None
            if with_targets:
                targets = self.on_device(self.read_cache(self.targets, rows))
            yield signals, targets

    def read_batches(self, rows_of_batches: Sequence[np.ndarray], with_targets: bool):
        """`batches` without a cache: the records are read again, and embedded again."""
        for items in self.load(rows_of_batches):
            problems = [item.problem for item in items if item.problem is not None]
            if problems:
                raise RecordError(f"{problems[0]}; it could be read when the run started")
            signals = self.on_device(np.stack([item.single for item in items]))
            targets = self.on_device(self.teach(items)) if with_targets else None
            yield signals, targets

    def load(self, rows_of_batches: Sequence[np.ndarray]) -> DataLoader:
        """Lists of `ReadPair`s, one a batch."""
        dataset = SkipUnreadable(self.dataset)
        sampler = [rows.tolist() for rows in rows_of_batches]
        workers = self.workers if len(sampler) > 4 else 0  # to start them takes a second
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),  # else weights would depend on what is in the cache
        )

    def teach(self, items: list[ReadPair]) -> np.ndarray:
        """(B, D) float16 of the frozen teacher, Eq. (2)."""
        multi_ecg = torch.from_numpy(np.stack([item.multi for item in items]))  # (B, 12, T)
        return embed(self.teacher, multi_ecg, self.device).half().numpy()

    def on_device(self, values: np.ndarray) -> torch.Tensor:
        """float32; a GPU computes on while the next batch is read and copied."""
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # a copy from other memory would wait for all steps
        return tensor.to(self.device, non_blocking=True).float()

    def places(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Where rows lie: (collection, which of them lie there, their rows in its arrays)."""
        records = self.dataset.records
        collection = records.collection[rows]
        for c in np.unique(collection):
            here = np.flatnonzero(collection == c)
            yield c, here, records.row[rows[here]]

    def read_cache(self, arrays: list[CachedArray], rows: np.ndarray) -> np.ndarray:
        values = np.empty((len(rows), *arrays[0].shape[1:]), np.float16)
        for c, here, cache_rows in self.places(rows):
            values[here] = arrays[c].read(cache_rows)
        return values

    def write_cache(self, arrays: list[CachedArray], rows: np.ndarray, values: np.ndarray) -> None:
        for c, here, cache_rows in self.places(rows):
            arrays[c].write(cache_rows, values[here])

    def not_in_cache(self, rows: np.ndarray) -> np.ndarray:
        """Those of these rows of which the signal or the embedding is missing."""
        done = np.full(len(rows), bool(self.signals))
        for c, here, cache_rows in self.places(rows):
            for arrays in (self.signals, self.targets):
                if arrays:
                    done[here] &= arrays[c].is_done()[cache_rows]
        return rows[~done]


def read_pairs(
    config: Config,
    records: Records,
    rows: np.ndarray,
    spec: InputSpec,
    ranks: Ranks,
    teacher: ResNet1D | None = None,
) -> Pairs:
    """Read these rows of the records once; keep all that training touches afterwards.

    That is the preprocessed lead and, since the teacher is frozen and sees unchanged records, its
    embedding.  All processes share the pass; rows that are in the cache are not read again.  With
    --cache none the pass only finds out which records can be used.  Unusable ones are named,
    counted and left out, or with --strict an error; no usable record is an error.
    """
    pairs = open_pairs(config, records, rows, spec, ranks, teacher)
    mine = [cache_key(collection) for collection in records.collections]
    if any(others != mine for others in ranks.gather_objects(mine)):
        remedy = "all need the same absolute path, and the same files behind it"
        raise UsageError(f"--data: not every machine sees the same records; {remedy}")
    if pairs.signals:
        make_shared_folder(pairs.signals[0].path.parent, "--cache", ranks)
    if ranks.is_main:
        for array in pairs.signals + pairs.targets:
            array.create()
    ranks.barrier()
    # The first process decides: another run may be writing into this cache meanwhile.
    todo = ranks.gather_objects(pairs.not_in_cache(rows) if ranks.is_main else None)[0]
    if len(todo):
        ranks.print(f"reading {len(todo):,} records")
    problems = read_rows(pairs, np.array_split(todo, ranks.world_size)[ranks.rank], config, ranks)
    ranks.barrier()
    for theirs in ranks.gather_objects(problems):
        problems = problems | theirs
    pairs.usable = rows[~np.isin(rows, list(problems))]
    pairs.unusable = [problems[row] for row in sorted(problems)]
    if problems:
        first = "; ".join(pairs.unusable[:3])
        found = f"{len(problems):,} of {len(rows):,} records cannot be used"
        if len(pairs.usable) == 0:
            raise UsageError(f"{found}, so none is left; the first: {first}")
        ranks.print(f"{found} and are left out: {first}")
    return pairs


def unusable_entry(pairs: Pairs) -> dict:
    """For config.json: how many records could not be used, and why, of the first thousand."""
    return dict(count=len(pairs.unusable), first=pairs.unusable[:1000])


def open_pairs(config, records, rows, spec, ranks, teacher) -> Pairs:
    """The pairs and where their cache lies; nothing is read.

    The key has everything that changes an array (a file that is replaced under its old name goes
    unnoticed): the signals' without the teacher, the embeddings' without the lead, so that
    ablations share what they can, and both without the rows, so that all folds and limits do.
    """
    is_multi = teacher is not None
    rate_hz = spec.sample_rate_hz
    dataset = SelfCuttingDataset(
        records, spec.lead, sample_rate_hz=rate_hz, multi=is_multi, **spec.preprocessing
    )
    workers = config.workers
    if workers is None:
        workers = min(16, available_cores() // ranks.local_world_size)
    pairs = Pairs(dataset, teacher, ranks.device, workers, [], [], rows)
    if config.cache == "none":
        return pairs
    folder = cache_folder(config)
    L = len(LEADS) if spec.lead == "all" else 1
    T = round(SECONDS * rate_hz)
    teacher_digest = weights_digest(teacher) if is_multi else None
    for collection in records.collections:
        N = len(collection.paths)
        key = [*cache_key(collection), rate_hz, spec.preprocessing]
        pairs.signals.append(CachedArray(folder, "signals", [*key, spec.lead], (N, L, T)))
        if is_multi:
            key.append(teacher_digest)
            shape = (N, teacher.embedding_dim)
            pairs.targets.append(CachedArray(folder, "targets", key, shape))
    return pairs


def cache_key(collection: Collection) -> list:
    """Of its whole list; of the records' contents nothing."""
    kind, root, paths = collection
    return [CACHE_VERSION, kind, root, hashlib.sha256(paths.tobytes()).hexdigest()]


def cache_folder(config: Config) -> Path:
    """--cache, by default a folder beside OUT."""
    return Path(config.cache or Path(config.out).absolute().parent / "cache")


def weights_digest(encoder: nn.Module) -> str:
    """Changes with every bit of an encoder's weights."""
    digest = hashlib.sha256()
    for key, value in encoder.state_dict().items():
        digest.update(key.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def read_rows(pairs: Pairs, rows: np.ndarray, config: Config, ranks: Ranks) -> dict[int, str]:
    """Read this process's share into the cache; {row: why it cannot be used}."""
    problems = {}
    read = 0
    started = last_line = time.time()
    batches = [rows[i : i + READ_BATCH] for i in range(0, len(rows), READ_BATCH)]
    for items in pairs.load(batches):
        problems |= {item.row: item.problem for item in items if item.problem is not None}
        if problems and config.strict:
            raise RecordError(f"--strict: {next(iter(problems.values()))}")
        items = [item for item in items if item.problem is None]
        if items and pairs.signals:
            good = np.array([item.row for item in items])
            pairs.write_cache(pairs.signals, good, np.stack([item.single for item in items]))
            if pairs.targets:
                pairs.write_cache(pairs.targets, good, pairs.teach(items))
        read = min(read + READ_BATCH, len(rows))
        if time.time() - last_line > 10:
            last_line = time.time()
            rate = read / (last_line - started)
            minutes = (len(rows) - read) / rate / 60
            text = f"{read:,} of {len(rows):,} records read | {rate:,.0f} records/s a process"
            ranks.print(f"{text} | eta {minutes:.1f} min")
    return problems
