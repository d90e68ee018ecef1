"""SimCLR: two noisy copies of five seconds are a pair.

    python -m extras.baselines.simclr --data ptb-xl --size small --out runs/simclr

Of each record a random segment of five seconds is disturbed twice (`augment`), z-scored, embedded;
NT-Xent over the batch asks which copies belong together.  After Chen et al. 2020 (arXiv
2002.05709).

Departures from the published form: its disturbances are drawn each time and drown the ECG (noise of
up to 0.5 mV on every lead, a step of 1 mV); here each comes with probability 1/2 and is mild, and
there is a gain.  --published goes back to them, but that the limb leads agree after the step too.
There is no powerline at 100 Hz, where 50 Hz lies on the edge and 60 Hz would fold to 40.  Leads are
blanked with --leads 12 only.  Views are always z-scored, five seconds at a time, where the
published ones stay in millivolts; leads are blanked behind that, so that one that is left is not
larger than a probe will show it.  And common.py's schedule.
"""

import dataclasses
import math
from typing import NamedTuple

import torch

from extras.baselines.common import ContrastiveConfig, ContrastiveMethod, random_segment
from extras.baselines.common import recompute_limbs, run_baseline, to_view, zscore
from extras.baselines.losses import nt_xent
from selfmis import flag


class Strength(NamedTuple):
    """Millivolts, but for the first and the last."""

    probability: float  # of each disturbance
    powerline: float  # amplitude, at most
    muscle: float  # deviation of white noise, at most
    step: float  # size of a raised piece, up or down, in each lead
    shift: tuple[float, float]  # of the same piece in all leads
    wander: float  # amplitude of each of three waves, at most
    gain: tuple[float, float]  # a factor


PUBLISHED = Strength(1.0, 0.5, 0.5, 1.0, (-0.25, 0.0), 0.5, (1.0, 1.0))
MILD = Strength(0.5, 0.05, 0.03, 0.0, (-0.1, 0.1), 0.1, (0.8, 1.25))


@dataclasses.dataclass
class SimCLRConfig(ContrastiveConfig):
    out: str = flag("runs/simclr", "folder of the run", metavar="DIR")
    published: bool = flag(False, "disturbances as strong as published, where ours are mild")


class SimCLR(ContrastiveMethod):
    """NT-Xent between two disturbed copies of a segment."""

    def forward(self, ecg, patients, draw):
        segment = random_segment(ecg, draw)  # (B, 12, T / 2)
        strength = PUBLISHED if self.config.published else MILD
        z = []
        for _ in range(2):
            view = augment(segment, draw, segment.shape[-1] / 5, strength)  # five seconds
            view = zscore(to_view(view, self.config.leads))
            if self.config.leads == 12:
                view = blank_leads(view, draw)
            z.append(self.embed(view))  # (W B, D)
        return nt_xent(*z), {}


def augment(
    ecg: torch.Tensor, draw: torch.Generator, sample_rate_hz: float, strength: Strength
) -> torch.Tensor:
    """(B, 12, T) mV -> (B, 12, T) mV, disturbed; other noise for each record."""
    B, L, T = ecg.shape
    t = torch.arange(T) / sample_rate_hz  # seconds

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=draw)

    def sometimes(values: torch.Tensor) -> torch.Tensor:
        """Zero for those records that are spared."""
        return values * (torch.rand(B, 1, 1, generator=draw) < strength.probability)

    noise = torch.zeros(B, L, T)
    if sample_rate_hz > 120:
        frequency_hz = torch.where(torch.rand(B, 1, 1, generator=draw) < 0.5, 50.0, 60.0)
        phase = uniform(0, 2 * math.pi, B, 1, 1)
        hum = torch.cos(2 * math.pi * frequency_hz * t + phase)
        noise = noise + sometimes(uniform(0, strength.powerline, B, 1, 1) * hum)
    muscle = uniform(0, strength.muscle, B, L, 1) * torch.randn(B, L, T, generator=draw)
    noise = noise + sometimes(muscle)
    wave_hz, phase = uniform(0.01, 0.2, B, 3, 1), uniform(0, 2 * math.pi, B, 3, 1)
    waves = uniform(0, strength.wander, B, 3, 1) * torch.cos(2 * math.pi * wave_hz * t + phase)
    share = 1 + 0.5 * torch.randn(B, L, 1, generator=draw)  # of each lead
    noise = noise + sometimes(share * waves.sum(1, keepdim=True))

    sign = torch.where(torch.rand(B, L, 1, generator=draw) < 0.5, -1.0, 1.0)
    raised = strength.step * sign + uniform(*strength.shift, B, 1, 1)
    length = T * (0.2 + 0.04 * torch.randn(B, 1, 1, generator=draw))
    start = uniform(0, 1, B, 1, 1) * (T - length)
    samples = torch.arange(T)
    noise = noise + sometimes(raised * ((samples >= start) & (samples < start + length)))
    gain = torch.where(
        torch.rand(B, 1, 1, generator=draw) < strength.probability,
        uniform(*strength.gain, B, 1, 1),
        1.0,
    )
    # The gain comes first: the z-score would take it out of the whole. The limb leads are made to
    # agree at last, whatever was added before.
    return recompute_limbs(gain.to(ecg) * ecg + noise.to(ecg))


def blank_leads(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """(B, L, T) with each lead zero with probability 1/2."""
    is_kept = torch.rand(*x.shape[:2], 1, generator=draw) < 0.5
    return x * is_kept.to(x)


if __name__ == "__main__":
    run_baseline(SimCLR, SimCLRConfig, __doc__)
