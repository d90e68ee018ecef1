"""3KG: the same heart, turned and stretched, is the same patient.

    python -m extras.baselines.three_kg --data ptb-xl --size small --out runs/3kg

Of each record a random segment of five seconds is seen twice: its eight independent leads become
the heart's dipole (inverse Dower matrix), which is turned by three angles of up to 45 degrees and
stretched along its axes, and leads again; then a window of half of each lead's samples is blanked.
All views of one patient in a batch belong together (`patient_nt_xent`).  After Gopal et al. 2021
(arXiv 2106.04452).

Departure: the dipole holds 58 % of lead I's variance, and the published view keeps nothing else,
turned or not.  Here what the dipole cannot hold stays as it is, so that no turn is no change;
--published leaves it out.  With --leads 1 twelve leads are turned and then lead I is cut.  Views
are z-scored, five seconds at a time and before the blanking, and not in millivolts as published.
And common.py's schedule.
"""

import dataclasses
import math

import torch

from extras.baselines.common import ContrastiveConfig, ContrastiveMethod, random_segment
from extras.baselines.common import recompute_limbs, run_baseline, to_view, zscore
from extras.baselines.losses import gather, patient_nt_xent
from extras.synthetic import INDEPENDENT_ROWS
from selfmis import flag

# Dipole (x, y, z) = INVERSE_DOWER @ (I, II, V1 ... V6).
INVERSE_DOWER = torch.tensor(
    [
        [0.156, -0.009, -0.172, -0.073, 0.122, 0.231, 0.239, 0.193],
        [-0.227, 0.886, 0.057, -0.019, -0.106, -0.022, 0.040, 0.048],
        [0.021, 0.102, -0.228, -0.310, -0.245, -0.063, 0.054, 0.108],
    ],
    dtype=torch.float64,
)
DOWER = torch.linalg.pinv(INVERSE_DOWER)  # (8, 3), back to the leads


@dataclasses.dataclass
class ThreeKGConfig(ContrastiveConfig):
    out: str = flag("runs/3kg", "folder of the run", metavar="DIR")
    published: bool = flag(False, "the dipole alone, without what it cannot hold")


class ThreeKG(ContrastiveMethod):
    """NT-Xent by patient between two turned copies of a segment."""

    def forward(self, ecg, patients, draw):
        segment = random_segment(ecg, draw)  # (B, 12, T / 2)
        z = []
        for _ in range(2):
            turned = turn(segment, *random_turn(len(ecg), draw), self.config.published)
            view = blank_half(zscore(to_view(turned, self.config.leads)), draw)
            z.append(self.embed(view))  # (W B, D)
        patients = gather(patients)  # (W B,)
        return patient_nt_xent(torch.cat(z), torch.cat([patients, patients])), {}


def random_turn(B: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles about z, y and x in radians, up to 45 degrees, and factors 1 to 1.5: (B, 3) each."""
    angles = (2 * torch.rand(B, 3, generator=draw) - 1) * math.pi / 4
    return angles, 1 + torch.rand(B, 3, generator=draw) / 2


def rotation(angles: torch.Tensor) -> torch.Tensor:
    """(B, 3) angles about z, y, x -> (B, 3, 3), about z first, by fixed axes."""
    cos, sin = angles.cos(), angles.sin()
    product = torch.eye(3, dtype=angles.dtype).expand(len(angles), 3, 3)
    for k, (first, second) in enumerate(((0, 1), (2, 0), (1, 2))):  # the plane that turns
        plane = torch.eye(3, dtype=angles.dtype).repeat(len(angles), 1, 1)
        plane[:, first, first] = plane[:, second, second] = cos[:, k]
        plane[:, first, second], plane[:, second, first] = -sin[:, k], sin[:, k]
        product = plane @ product
    return product


def turn(
    ecg: torch.Tensor, angles: torch.Tensor, factors: torch.Tensor, published: bool
) -> torch.Tensor:
    """(B, 12, T) mV of a heart -> (B, 12, T) mV of the same heart, turned and stretched."""
    change = factors.double()[:, :, None] * rotation(angles.double())  # S R, (B, 3, 3)
    kept = torch.zeros(8, 8, dtype=torch.float64)
    if not published:
        kept = torch.eye(8, dtype=torch.float64)
        change = change - torch.eye(3, dtype=torch.float64)
    matrix = kept + DOWER @ change @ INVERSE_DOWER  # (B, 8, 8)
    with torch.autocast(ecg.device.type, enabled=False):  # bf16 would round the signal itself
        leads = matrix.to(ecg) @ ecg[:, INDEPENDENT_ROWS]  # (B, 8, T)
    turned = ecg.clone()
    turned[:, INDEPENDENT_ROWS] = leads
    return recompute_limbs(turned)


def blank_half(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """(B, L, T) with half of each lead's samples zero: a window of its own, round the end."""
    B, L, T = x.shape
    start = torch.randint(T, (B, L, 1), generator=draw)
    is_kept = (torch.arange(T) - start) % T >= T // 2
    return x * is_kept.to(x)


if __name__ == "__main__":
    run_baseline(ThreeKG, ThreeKGConfig, __doc__)
