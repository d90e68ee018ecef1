"""Pix2Pix: twelve leads out of lead I, so that a judge who sees both finds them real.

    python -m extras.baselines.pix2pix --data ptb-xl --size small --out runs/p2p

The generator, a U-Net with batch norm, is told "real" by a judge of pieces who sees lead I beside
the twelve leads, and pulled to the true leads by 50 times the mean absolute error.  After Isola et
al. 2017 (arXiv 1611.07004).

Departures from the original for photographs: 50, where it has 100; kernels of (2, 4) on an image of
16 rows, lead I in twelve of them; the judge's two losses are summed, not halved.  And gan.py's.
"""

import dataclasses

from extras.baselines.common import run_baseline
from extras.baselines.gan import WIDTHS, GenerativeConfig, GenerativeMethod, PatchDiscriminator
from extras.baselines.gan import UNetGenerator, as_image, conditional_losses, distance, repeat_lead
from selfmis import flag


@dataclasses.dataclass
class Pix2PixConfig(GenerativeConfig):
    out: str = flag("runs/pix2pix", "folder of the run", metavar="DIR")
    error_weight: float = flag(50.0, "of the mean absolute error")


class Pix2Pix(GenerativeMethod):
    """A conditional judge and the absolute error."""

    def __init__(self, config: Pix2PixConfig) -> None:
        super().__init__(config)
        self.judge = PatchDiscriminator(2, WIDTHS[config.size])

    @staticmethod
    def make_encoder(config: Pix2PixConfig) -> UNetGenerator:
        return UNetGenerator(width=WIDTHS[config.size])

    def forward(self, ecg, patients, draw):
        piece = self.pieces(ecg, draw)
        given, true = repeat_lead(piece[:, :1]), as_image(piece)  # (B, 1, 16, 512)
        made, _ = self.encoder.unet(given)
        error = distance(made, true)
        fooled, judged = conditional_losses(self.judge, given, true, made)
        numbers = dict(error=error.detach(), fooled=fooled.detach(), judged=judged.detach())
        return fooled + self.config.error_weight * error + judged, numbers


if __name__ == "__main__":
    run_baseline(Pix2Pix, Pix2PixConfig, __doc__)
