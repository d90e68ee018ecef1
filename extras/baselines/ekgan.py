"""EKGAN: twelve leads out of lead I, whose narrowest layer must be that of the twelve leads.

    python -m extras.baselines.ekgan --data ptb-xl --size small --out runs/ekgan

The generator is a U-Net; beside it a label network, a U-Net without skips, squeezes the true twelve
leads and draws them again.  The generator is told "real" by a judge of every sample, pulled to the
true leads by 50 times the mean absolute error, and its narrowest layer to the label network's.
After Joo et al. 2023 (MICCAI, doi 10.1007/978-3-031-43990-2_18).

Departures from the published form: the label network draws the twelve leads that it is given (in
the published code the input, lead I), so that its narrowest layer knows them; --size small has
Pix2Pix's rate of 2e-4, where 1e-4 is published.  And gan.py's.
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

from extras.baselines.common import run_baseline
from extras.baselines.gan import WIDTHS, GenerativeConfig, GenerativeMethod, UNet, UNetGenerator
from extras.baselines.gan import as_image, conditional_losses, distance, initialise, repeat_lead
from selfmis import flag

KERNELS = (64, 32, 16, 8, 4)  # samples, of one row
STRIDES = (4, 4, 4, 2, 2)


@dataclasses.dataclass
class EKGANConfig(GenerativeConfig):
    out: str = flag("runs/ekgan", "folder of the run", metavar="DIR")


class SampleDiscriminator(nn.Module):
    """Images (B, 2, 16, T) -> logits (B, 1, 16, T), each row on its own; T a multiple of 256."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = [2, width, 2 * width, 4 * width, 8 * width, 16 * width]
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        self.down_norms, self.up_norms = nn.ModuleList(), nn.ModuleList()
        for i, (kernel, stride) in enumerate(zip(KERNELS, STRIDES, strict=True)):
            shape = dict(kernel_size=(1, kernel), stride=(1, stride), bias=False)
            shape["padding"] = (0, (kernel - stride) // 2)
            self.downs.append(nn.Conv2d(channels[i], channels[i + 1], **shape))
            self.down_norms.append(nn.BatchNorm2d(channels[i + 1]) if i else nn.Identity())
            c_in = channels[i + 1] if i == 4 else 2 * channels[i + 1]  # the way up joins
            c_out = channels[i] if i else 1
            self.ups.insert(0, nn.ConvTranspose2d(c_in, c_out, **shape))
            self.up_norms.insert(0, nn.BatchNorm2d(c_out) if i else nn.Identity())
        self.apply(initialise)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        passed = []
        x = image
        for conv, norm in zip(self.downs, self.down_norms, strict=True):
            passed.append(x)
            x = F.leaky_relu(norm(conv(x)), 0.3)
        for conv, norm in zip(self.ups, self.up_norms, strict=True):
            below = passed.pop()
            x = norm(conv(x))
            if passed:
                x = torch.cat([F.relu(x), below], 1)
        return x


class EKGAN(GenerativeMethod):
    """A judge of samples, the absolute error, and the distance of the narrowest layers."""

    published = GenerativeMethod.published | dict(batch_size=128, lr=1e-4)

    def __init__(self, config: EKGANConfig) -> None:
        super().__init__(config)
        width = WIDTHS[config.size]
        self.label = UNet(width, skips=False)
        self.judge = SampleDiscriminator(width // 2)

    @staticmethod
    def make_encoder(config: EKGANConfig) -> UNetGenerator:
        return UNetGenerator(width=WIDTHS[config.size])

    def forward(self, ecg, patients, draw):
        piece = self.pieces(ecg, draw)
        given, true = repeat_lead(piece[:, :1]), as_image(piece)  # (B, 1, 16, 512)
        made, narrowest = self.encoder.unet(given)
        drawn, known = self.label(true)
        error, label_error = distance(made, true), distance(drawn, true)
        apart = distance(narrowest, known.detach())
        fooled, judged = conditional_losses(self.judge, given, true, made)
        loss = fooled + 50 * error + apart + label_error + judged
        numbers = dict(error=error, apart=apart, label_error=label_error, judged=judged)
        return loss, {name: value.detach() for name, value in numbers.items()}


if __name__ == "__main__":
    run_baseline(EKGAN, EKGANConfig, __doc__)
