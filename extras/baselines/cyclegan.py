"""CycleGAN: from lead I to twelve leads and back, without being told which belong together.

    python -m extras.baselines.cyclegan --data ptb-xl --size small --out runs/cyc

Two U-Nets with instance norm, there (lead I in all twelve rows -> twelve leads) and back, each with
a judge of pieces of its own.  Each is told "real" by its judge; both circles, there and back and
back and there, must end where they began (10 times the mean absolute error), and what is already on
the other side must stay (2.5 times).  After Zhu et al. 2017 (arXiv 1703.10593).

Departures from the original for photographs: U-Nets with kernels of (2, 4) on an image of 16 rows;
2.5, where it has 5; cross-entropy, not squares; judges do not see older fakes again.  And gan.py's.
"""

import dataclasses

import torch

from extras.baselines.common import run_baseline
from extras.baselines.gan import GenerativeConfig, GenerativeMethod, PatchDiscriminator, UNet
from extras.baselines.gan import UNetGenerator, as_image, distance, frozen
from extras.baselines.gan import loss_if_made, loss_if_real, repeat_lead, width_of
from selfmis import flag


@dataclasses.dataclass
class CycleGANConfig(GenerativeConfig):
    out: str = flag("runs/cyclegan", "folder of the run", metavar="DIR")


class CycleGAN(GenerativeMethod):
    """Two generators, two judges, two circles."""

    def __init__(self, config: CycleGANConfig) -> None:
        super().__init__(config)
        width = width_of(config)
        self.back = UNet(width, norm="instance")
        self.judge_single = PatchDiscriminator(1, width, norm="instance")
        self.judge_multi = PatchDiscriminator(1, width, norm="instance")

    @staticmethod
    def make_encoder(config: CycleGANConfig) -> UNetGenerator:
        return UNetGenerator(width=width_of(config), norm="instance")

    def forward(self, ecg, patients, draw):
        piece = self.pieces(ecg, draw)
        single, multi = repeat_lead(piece[:, :1]), as_image(piece)  # (B, 1, 16, 512)
        there, back = self.encoder.unet, self.back
        made_multi, made_single = there(single)[0], back(multi)[0]
        circles = distance(back(made_multi)[0], single) + distance(there(made_single)[0], multi)
        kept = distance(there(multi)[0], multi) + distance(back(single)[0], single)
        fooled = loss_if_real(frozen(self.judge_multi, made_multi))
        fooled = fooled + loss_if_real(frozen(self.judge_single, made_single))
        judged = tell_apart(self.judge_multi, multi, made_multi)
        judged = judged + tell_apart(self.judge_single, single, made_single)
        # A circle counts for both generators, and its gradient reaches both at once.
        loss = fooled + 10 * circles + 2.5 * kept + judged
        numbers = dict(error=distance(made_multi, multi), circles=circles, judged=judged)
        return loss, {name: value.detach() for name, value in numbers.items()}


def tell_apart(network: PatchDiscriminator, true: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Half the loss of telling them apart."""
    return (loss_if_real(network(true)) + loss_if_made(network(made.detach()))) / 2


if __name__ == "__main__":
    run_baseline(CycleGAN, CycleGANConfig, __doc__)
