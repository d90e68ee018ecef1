"""What the generative methods share: twelve leads as an image, the U-Net, the discriminators.

A generator makes eleven leads out of lead I.  Its unit is one fixed number, the root mean square
of its first batch in mV, since the size of a record's own twelve leads is unknown where only lead I
is given.  It learns on pieces of 512 samples; being convolutional it takes any length (an instance
norm then sees more of it).  Image, U-Net and judge of pieces are those of EKGAN's public code, in
which Pix2Pix and CycleGAN are compared too.

Departures of all of them: generator and judge step at once, both from their old weights; gradients
of both are clipped at 1 by their joint norm (Adam undoes what is constant in that scale), and the
rate falls by a cosine; no dropout.  Batch norm is that of each process.
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

from extras.baselines.common import PUBLISHED_BUDGET, SMALL_BUDGET, BaselineConfig
from extras.baselines.common import BaselineTraining, Method, random_segment
from extras.baselines.losses import gather
from selfmis import UsageError, flag, lead_index

PIECE = 512  # samples that training sees at once
LEAD_I = lead_index("I")
WIDTHS = {"published": 64, "small": 16}


@dataclasses.dataclass
class GenerativeConfig(BaselineConfig):
    """Flags of pix2pix, cyclegan, ekgan and mcma."""

    leads: int = flag(1, "lead I, out of which the others are made", choices=(1,))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filter not in (None, "none"):
            raise UsageError("--filter: generators work on millivolts as recorded")
        if self.sample_rate is not None and 10 * self.sample_rate < PIECE:
            raise UsageError(
                f"--sample-rate {self.sample_rate:g}: ten seconds must hold {PIECE} samples; give "
                "52 or more"
            )


def as_image(ecg: torch.Tensor) -> torch.Tensor:
    """(B, 12, T) -> (B, 1, 16, T): two rows of zeros above the leads and two below."""
    return F.pad(ecg, (0, 0, 2, 2))[:, None]


def as_leads(image: torch.Tensor) -> torch.Tensor:
    """(B, 1, 16, T) -> (B, 12, T)."""
    return image[:, 0, 2:14]


def repeat_lead(lead: torch.Tensor) -> torch.Tensor:
    """What a U-Net is given, (B, 1, T) -> (B, 1, 16, T): the lead in all twelve rows."""
    return as_image(lead.expand(-1, 12, -1))


def make_norm(name: str, channels: int) -> nn.Module:
    kinds = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
    return kinds[name](channels, affine=True)


class UNet(nn.Module):
    """Images (B, 1, 16, T) -> images (B, 1, 16, T) and the narrowest layer (B, 16 w, 1, T / 32).

    T: a multiple of 32.  skips=False leaves the narrowest layer as the only way through.
    """

    def __init__(self, width: int = 64, *, norm: str = "batch", skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        channels = [1, width, 2 * width, 4 * width, 8 * width, 16 * width]
        self.strides = [(2, 2), (2, 2), (2, 2), (2, 2), (1, 2)]
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        self.down_norms, self.up_norms = nn.ModuleList(), nn.ModuleList()
        for i, stride in enumerate(self.strides):
            c_in, c_out = channels[i], channels[i + 1]
            self.downs.append(nn.Conv2d(c_in, c_out, (2, 4), stride, bias=False))
            self.down_norms.append(nn.Identity() if i == 0 else make_norm(norm, c_out))
        for i, stride in reversed(list(enumerate(self.strides))):
            doubled = 2 if skips and i < 4 else 1  # the way up joins what came down
            c_in, c_out = doubled * channels[i + 1], channels[i]
            self.ups.append(
                nn.ConvTranspose2d(c_in, c_out, (2, 4), stride, padding=(0, 1), bias=False)
            )
            self.up_norms.append(nn.Identity() if i == 0 else make_norm(norm, c_out))
        self.apply(initialise)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        passed = []
        x = image
        for conv, norm, stride in zip(self.downs, self.down_norms, self.strides, strict=True):
            passed.append(x)
            x = F.pad(x, (1, 1, 0, 2 - stride[0]))  # "same", as TensorFlow counts it
            x = F.leaky_relu(norm(conv(x)), 0.3)
        narrowest = x  # (B, 16 w, 1, T / 32)
        for conv, norm in zip(self.ups, self.up_norms, strict=True):
            below = passed.pop()
            x = norm(conv(x)[..., : below.shape[2], :])  # "same" again: a stride of 1 adds a row
            if passed:
                x = F.relu(x)
                x = torch.cat([x, below], 1) if self.skips else x
        return x, narrowest


class PatchDiscriminator(nn.Module):
    """Images (B, C, 16, 512) -> logits (B, 1, 5, 65), each for a piece: real or not."""

    def __init__(self, channels: int, width: int = 64, *, norm: str = "batch") -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width, 8 * width]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, stride in enumerate((2, 2, 2, 1)):
            self.convs.append(nn.Conv2d(widths[i], widths[i + 1], (2, 4), stride, bias=False))
            self.norms.append(nn.Identity() if i == 0 else make_norm(norm, widths[i + 1]))
        self.judge = nn.Conv2d(widths[-1], 1, (2, 4), bias=False)
        self.apply(initialise)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if i == 3:  # a frame of zeros, and then "same" at stride 1
                x = F.pad(F.pad(x, (1, 1, 1, 1)), (1, 2, 0, 1))
            else:
                x = F.pad(x, (1, 1, 0, 0))
            x = F.leaky_relu(norm(conv(x)), 0.3)
        return self.judge(F.pad(x, (1, 1, 1, 1)))


def initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=0.02)


def loss_if_real(logits: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy against 1: these are real."""
    return F.softplus(-logits.float()).mean()


def loss_if_made(logits: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy against 0: these are made."""
    return F.softplus(logits.float()).mean()


def frozen(network: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """network(*inputs), whose weights get no gradient: what a generator's loss asks of a judge.

    Nor do its running statistics move.
    """
    state = {name: weight.detach() for name, weight in network.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    return torch.func.functional_call(network, state, inputs)


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The mean absolute error."""
    return (a - b).float().abs().mean()


def judge_loss(judge: nn.Module, true: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """A judge's own loss, of which no gradient reaches the generator."""
    return loss_if_real(judge(true)) + loss_if_made(judge(made.detach()))


def conditional_losses(
    judge: nn.Module, given: torch.Tensor, true: torch.Tensor, made: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 1, 16, T) -> the generator's loss, and that of a judge who sees `given` too."""
    made, true = torch.cat([given, made], 1), torch.cat([given, true], 1)  # (B, 2, 16, T)
    return loss_if_real(frozen(judge, made)), judge_loss(judge, true, made)


class Generator(nn.Module):
    """Lead I in mV (B, 1, T) -> twelve leads in mV (B, 12, T), lead I as it was.

    architecture: the arguments that build it again.  training_data: what it has seen.
    `draw(lead)` is the network's part, in units of `scale` mV, for a multiple of 32 samples.
    """

    def __init__(self, **architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.training_data: list[dict] = []
        self.register_buffer("scale", torch.zeros(()))  # mV; 0: not known yet

    def draw(self, lead: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, lead: torch.Tensor) -> torch.Tensor:
        T = lead.shape[-1]
        longer = -T % 32
        padded = F.pad(lead, (longer // 2, longer - longer // 2), mode="reflect")
        ecg = self.draw(padded / self.scale) * self.scale
        ecg = ecg[..., longer // 2 : longer // 2 + T]
        return torch.cat([ecg[:, :LEAD_I], lead, ecg[:, LEAD_I + 1 :]], 1)


class UNetGenerator(Generator):
    """The U-Net of Pix2Pix, CycleGAN and EKGAN."""

    def __init__(self, *, width: int = 64, norm: str = "batch") -> None:
        super().__init__(width=width, norm=norm)
        self.unet = UNet(width, norm=norm)

    def draw(self, lead: torch.Tensor) -> torch.Tensor:
        return as_leads(self.unet(repeat_lead(lead))[0])


class GenerativeMethod(Method):
    """A generator, which is kept, and what judges it.

    The loss is a sum: the generator's, which sees the judge with its weights frozen, and the
    judge's, which sees what was made without its gradient.  So one backward pass gives each side
    the gradient of its own loss alone.
    """

    # Pix2Pix's and CycleGAN's rate; epochs and batch are ours where a method has none of its own.
    published = PUBLISHED_BUDGET | dict(epochs=100, lr=2e-4, weight_decay=0.0)
    small = SMALL_BUDGET | dict(lr=2e-4, warmup=0, weight_decay=0.0)
    betas = (0.5, 0.999)
    normalize = "none"

    @staticmethod
    def next_command(run: BaselineTraining) -> str:
        config = run.config
        command = f"python -m extras.baselines.generated make {run.out / 'best.pt'} --out {run.out}"
        folds = f"--val-fold {config.val_fold} --test-fold {config.test_fold}"
        labelled = [c.root for c in run.pairs.dataset.records.collections if c.kind == "ptb-xl"]
        return f"{command} --data {(labelled or ['YOUR_PTB_XL_FOLDER'])[0]} {folds}"

    def pieces(self, ecg: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """A random piece of each record, in units of the generator's scale: (B, 12, 512).

        The scale is that of the first batch of all processes, and then stays.
        """
        if self.training and self.encoder.scale == 0:
            self.encoder.scale.copy_(gather(ecg.square().mean()[None]).mean().sqrt())
        return random_segment(ecg, draw, PIECE) / self.encoder.scale
