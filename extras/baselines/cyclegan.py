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

from extras.baselines.common import run_baseline
from extras.baselines.gan import WIDTHS, GenerativeConfig, GenerativeMethod, PatchDiscriminator
from extras.baselines.gan import UNet, UNetGenerator, as_image, distance, frozen, judge_loss
from extras.baselines.gan import loss_if_real, repeat_lead
from selfmis import flag


@dataclasses.dataclass
class CycleGANConfig(GenerativeConfig):
    out: str = flag("runs/cyclegan", "folder of the run", metavar="DIR")


class CycleGAN(GenerativeMethod):
    """Two generators, two judges, two circles."""

    def __init__(self, config: CycleGANConfig) -> None:
        super().__init__(config)
        width = WIDTHS[config.size]
        self.back = UNet(width, norm="instance")
        self.judge_single = PatchDiscriminator(1, width, norm="instance")
        self.judge_multi = PatchDiscriminator(1, width, norm="instance")

    @staticmethod
    def make_encoder(config: CycleGANConfig) -> UNetGenerator:
        return UNetGenerator(width=WIDTHS[config.size], norm="instance")

    def forward(self, ecg, patients, draw):
        piece = self.pieces(ecg, draw)
        single, multi = repeat_lead(piece[:, :1]), as_image(piece)  # (B, 1, 16, 512)
        there, back = self.encoder.unet, self.back
        made_multi, made_single = there(single)[0], back(multi)[0]
        circles = distance(back(made_multi)[0], single) + distance(there(made_single)[0], multi)
        kept = distance(there(multi)[0], multi) + distance(back(single)[0], single)
        fooled = loss_if_real(frozen(self.judge_multi, made_multi))
        fooled = fooled + loss_if_real(frozen(self.judge_single, made_single))
        judged = judge_loss(self.judge_multi, multi, made_multi)
        judged = (judged + judge_loss(self.judge_single, single, made_single)) / 2
        # A circle counts for both generators, and its gradient reaches both at once.
        loss = fooled + 10 * circles + 2.5 * kept + judged
        numbers = dict(error=distance(made_multi, multi), circles=circles, judged=judged)
        return loss, {name: value.detach() for name, value in numbers.items()}


if __name__ == "__main__":
    run_baseline(CycleGAN, CycleGANConfig, __doc__)
