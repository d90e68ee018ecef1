"""What speed.py and speed_gpu.py measure with: clocks, counts, and the network of the original."""

import math
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import selfmis
import train_pretrain
from extras.synthetic import synthesize
from selfmis import LEADS, Block, InputSpec, Learner, Ranks, ResNet1D, SameConv1d, SelfMIS
from train_pretrain import PretrainConfig

ALONE = Ranks(0, 1, 1, torch.device("cpu"))
TINY = dict(stem=16, widths=[16, 32], depths=[1, 1])  # the encoder of --mini


# --------------------------------------------------------------------------------------------------
# Clocks and counts
# --------------------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(function, repeats: int = 5, device: torch.device = ALONE.device) -> float:
    """Of a call, after one that does not count."""
    function()
    seconds = []
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        function()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def in_turns(functions: dict) -> dict[str, float]:
    """Median seconds of each, called one after the other, so that noise meets all alike."""
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    start = time.perf_counter()
    rounds = 0
    while rounds < 3 or (time.perf_counter() - start < 3 and rounds < 50):
        rounds += 1
        for name, function in functions.items():
            before = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - before)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def peak_mib() -> float:
    """The most memory that this process has held."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def count_macs(encoder: ResNet1D, rate_hz: int) -> int:
    """Multiply-accumulates of convolutions and linear layers for 10 s; nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ResNet1D(**encoder.architecture)(torch.empty(1, encoder.leads, 10 * rate_hz))
    return counter.get_total_flops() // 2


def convolution_shapes(encoder: ResNet1D, B: int, T: int) -> list[tuple[tuple, tuple]]:
    """Shapes of input and output of each convolution, in the order of modules()."""
    shapes = []

    def note(layer, inputs, output) -> None:
        shapes.append((tuple(inputs[0].shape), tuple(output.shape)))

    with torch.device("meta"):  # nothing is computed
        network = ResNet1D(**encoder.architecture)
        for layer in network.modules():
            if isinstance(layer, SameConv1d):
                layer.register_forward_hook(note)
        network(torch.empty(B, encoder.leads, T))
    return shapes


# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------


def input_spec(rate_hz: float) -> InputSpec:
    return InputSpec("I", rate_hz, dict(normalize="zscore", filter="none"))


def make_learner(encoder: nn.Module, ranks: Ranks, **settings) -> Learner:
    """An encoder ready to be aligned, as train_pretrain.py makes it."""
    config = PretrainConfig(**settings)
    model = SelfMIS(encoder, config.loss).to(ranks.device)
    return Learner(model, train_pretrain.make_optimizer(model, config), config, ranks)


def train_step(learner: Learner, signals: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of one step of alignment: signals (B, 1, T), targets (B, D)."""
    loss = learner.forward(signals, targets)
    learner.update(loss)
    return loss.detach()


def write_records(folder: Path, n: int) -> None:
    """n synthetic WFDB records."""
    wfdb = selfmis.import_optional("wfdb", "writing records")
    folder.mkdir()
    units, formats = ["mV"] * len(LEADS), ["16"] * len(LEADS)
    for i, ecg in enumerate(synthesize(n, 0)[0]):
        signal = ecg.T.astype(np.float64)  # (T, 12)
        wfdb.wrsamp(f"{i:05}", 500, units, list(LEADS), signal, fmt=formats, write_dir=str(folder))


class PaddedConv1d(nn.Module):
    """A convolution (B, C, T) -> (B, C', ceil(T / stride)) behind a padding with zeros."""

    def __init__(self, like: nn.Conv1d) -> None:
        super().__init__()
        self.kernel, self.stride = like.kernel_size[0], like.stride[0]
        sizes = like.in_channels, like.out_channels, self.kernel, self.stride
        self.conv = nn.Conv1d(*sizes, groups=like.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T = x.shape[-1]
        zeros = max(0, (math.ceil(T / self.stride) - 1) * self.stride + self.kernel - T)
        return self.conv(F.pad(x, (zeros // 2, zeros - zeros // 2)))


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


class LayeredBlock(nn.Module):
    """What Block computes, a layer at a time."""

    def __init__(self, like: Block) -> None:
        super().__init__()
        self.is_first, self.stride = like.is_first, like.stride
        self.channels = like.channels_before, like.channels_behind
        self.conv1 = PaddedConv1d(like.conv1.conv)
        self.conv2 = PaddedConv1d(like.conv2.conv)
        self.conv3 = PaddedConv1d(like.conv3.conv)
        self.se_fc1 = nn.Linear(like.se_fc1.in_features, like.se_fc1.out_features)
        self.se_fc2 = nn.Linear(like.se_fc2.in_features, like.se_fc2.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.is_first else swish(x)  # (B, C, T)
        h = self.conv1(h)
        h = self.conv2(swish(h))
        h = self.conv3(swish(h))
        gate = torch.sigmoid(self.se_fc2(swish(self.se_fc1(h.mean(-1)))))  # (B, C')
        if self.stride > 1:
            x = F.max_pool1d(F.pad(x, (0, 1)), self.stride)
        x = F.pad(x, (0, 0, *self.channels))
        return torch.einsum("bct,bc->bct", h, gate) + x


class LayeredResNet1D(nn.Module):
    """An encoder as ECGFounder publishes it: signals (B, C, T), conv1d, every layer on its own.

    It takes the same weights and returns the same embeddings.
    """

    def __init__(self, encoder: ResNet1D) -> None:
        super().__init__()
        self.first_conv = PaddedConv1d(encoder.first_conv.conv)
        self.stage_list = nn.ModuleList()
        for stage in encoder.stage_list:
            blocks = nn.ModuleList(LayeredBlock(block) for block in stage["block_list"])
            self.stage_list.append(nn.ModuleDict({"block_list": blocks}))
        self.load_state_dict(encoder.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = swish(self.first_conv(x))
        for stage in self.stage_list:
            for block in stage["block_list"]:
                x = block(x)
        return x.mean(-1)
