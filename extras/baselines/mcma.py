"""MCMA: twelve leads out of one, by squared error alone.

    python -m extras.baselines.mcma --data ptb-xl --size small --out runs/mcma

A U-Net over time with twelve channels in and out.  All channels are zero but the one lead that is
known, in its own place; the target is all twelve leads.  After Chen et al. 2024 (arXiv 2407.11481).

Departures from the published form: the known lead is always I (--any-lead draws another one for
each record and step; the published code draws one, once); pieces of 512 samples, not 1,024; no
instance norm at the end, where it forces every lead of a window to one mean and one deviation and
the amplitude is gone.  In its place a linear layer of 156 weights, because a sum of GELUs cannot
fall below -0.34.  --published keeps the norm.
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

from extras.baselines.common import run_baseline
from extras.baselines.gan import LEAD_I, GenerativeConfig, GenerativeMethod, Generator, distance
from selfmis import LEADS, flag

WIDTHS = {"published": 16, "small": 8}


@dataclasses.dataclass
class MCMAConfig(GenerativeConfig):
    out: str = flag("runs/mcma", "folder of the run", metavar="DIR")
    any_lead: bool = flag(False, "the known lead is drawn for each record")
    published: bool = flag(
        False, "the published instance norm at the end (--size has only the size)"
    )


class ResidualBlock(nn.Module):
    """A short way and a long one, added: (B, C, T) -> (B, C', T / stride), or T stride if `up`."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int,
        stride: int = 1,
        *,
        up: bool = False,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.short = self.resampling(c_in, c_out, kernel_size, stride, up)
        self.long = self.resampling(c_in, c_out, kernel_size, stride, up)
        self.channel_norm = nn.LayerNorm(c_out)
        self.again = nn.Conv1d(c_out, c_out, kernel_size, padding="same")
        self.norm = nn.InstanceNorm1d(c_out, affine=True) if norm else nn.Identity()

    @staticmethod
    def resampling(c_in: int, c_out: int, kernel_size: int, stride: int, up: bool) -> nn.Module:
        padding = kernel_size // 2
        if up:
            return nn.ConvTranspose1d(
                c_in, c_out, kernel_size, stride, padding, output_padding=stride - 1
            )
        return nn.Conv1d(c_in, c_out, kernel_size, stride, padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        long = self.channel_norm(self.long(x).transpose(1, 2)).transpose(1, 2)
        return self.norm(F.gelu(self.short(x)) + F.gelu(self.again(F.gelu(long))))


class MCMAGenerator(Generator):
    """(B, 12, T) of which one lead is known -> (B, 12, T); as a `Generator` from lead I."""

    def __init__(self, *, width: int = 16, kernel_size: int = 13, last_norm: bool = False) -> None:
        super().__init__(width=width, kernel_size=kernel_size, last_norm=last_norm)
        widths = [width * 2**i for i in range(6)]
        k = kernel_size
        self.downs = nn.ModuleList([ResidualBlock(12, widths[0], k)])
        self.ups, self.skips = nn.ModuleList(), nn.ModuleList()
        for low, high in zip(widths[:-1], widths[1:], strict=True):
            self.downs.append(ResidualBlock(low, high, k, 2))
            self.ups.insert(0, ResidualBlock(high, low, k, 2, up=True))
            self.skips.insert(0, ResidualBlock(low, low, k))
        self.last = ResidualBlock(widths[0], 12, k, norm=last_norm)
        self.out = nn.Identity() if last_norm else nn.Conv1d(12, 12, 1)

    def fill(self, known: torch.Tensor) -> torch.Tensor:
        """(B, 12, T), T a multiple of 32."""
        passed = []
        x = known
        for down in self.downs:
            x = down(x)
            passed.append(x)
        passed.pop()
        for up, skip in zip(self.ups, self.skips, strict=True):
            x = up(x) + skip(passed.pop())
        return self.out(self.last(x))

    def draw(self, lead: torch.Tensor) -> torch.Tensor:
        return self.fill(F.pad(lead, (0, 0, LEAD_I, len(LEADS) - 1 - LEAD_I)))


class MCMA(GenerativeMethod):
    """Mean squared error."""

    published = GenerativeMethod.published | dict(batch_size=256, lr=1e-3)
    small = GenerativeMethod.small | dict(lr=1e-3)
    betas = (0.9, 0.999)

    @staticmethod
    def make_encoder(config: MCMAConfig) -> MCMAGenerator:
        return MCMAGenerator(width=WIDTHS[config.size], last_norm=config.published)

    def forward(self, ecg, patients, draw):
        piece = self.pieces(ecg, draw)
        made = self.encoder.fill(keep_one(piece, draw if self.config.any_lead else None))
        numbers = dict(error=distance(made, piece).detach())
        return (made - piece).float().square().mean(), numbers


def keep_one(ecg: torch.Tensor, draw: torch.Generator | None) -> torch.Tensor:
    """(B, 12, T) with eleven rows of zeros: all but lead I, or but one drawn for each record."""
    kept = torch.full((len(ecg), 1), LEAD_I)
    if draw is not None:
        kept = torch.randint(len(LEADS), (len(ecg), 1), generator=draw)
    is_kept = torch.arange(len(LEADS)) == kept  # (B, 12)
    return ecg * is_kept[..., None].to(ecg)


if __name__ == "__main__":
    run_baseline(MCMA, MCMAConfig, __doc__)
