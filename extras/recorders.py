"""train_pretrain.py, whose student sees halves of its lead as a simple recorder would pass them.

    python -m extras.recorders --data ptb-xl --multi runs/teacher/best.pt --epochs 16 \\
        --out runs/recorders

What a person holds in two hands passes less than a hospital's machine: capacitors at its inputs
are a causal high-pass of up to a hertz, which bends the ST segment and the T wave; it passes little
above 20 to 40 Hz, which rounds the QRS complex; hands move, which lets the baseline wander, or are
swapped, which turns it upside down.  To a detector that has never seen this, all four look like
infarcts (RESULTS.md, "Other devices"); muscle noise does not.  So here every record passes another
random recorder in every epoch (`record_simply`), and five seconds of it are seen at another gain
(as in halves.py, which alone makes fewer false alarms too), while the teacher sees all as it is.
All flags are train_pretrain.py's.
"""

import dataclasses
import math

import torch

import selfmis
import train_pretrain
from extras.baselines.common import random_stream, zscore
from extras.baselines.crops import random_half
from selfmis import UsageError, flag
from train_pretrain import PretrainConfig, Training


INPUT = dict(lead="I", normalize="zscore", filter="none")
ONLY = "a simple recorder has lead I, z-scored and not filtered"


@dataclasses.dataclass
class RecorderConfig(PretrainConfig):
    out: str = flag("runs/recorders", "folder of the run", metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in INPUT.items():
            if getattr(self, name) not in (None, value):
                raise UsageError(f"--{name} {getattr(self, name)}: {ONLY}")


@dataclasses.dataclass
class RecorderTraining(Training):
    """train_pretrain.py's run; its views pass a recorder on their way to the student.

    Validation does not: its loss is that of the records as they are, and chooses best.pt.
    """

    kind = "pretrain on halves through simple recorders"

    def step_loss(self, rows, signals, targets) -> torch.Tensor:
        draw = random_stream(self.config.seed, self.epoch, self.step, self.ranks.rank)
        passed = zscore(record_simply(signals, self.spec.sample_rate_hz, draw))
        return super().step_loss(rows, random_half(passed, draw), targets)


def record_simply(x: torch.Tensor, sample_rate_hz: float, draw: torch.Generator) -> torch.Tensor:
    """z-scored records (B, L, T) -> (B, L, T), each through a recorder of its own.

    One in two wanders, by up to its own deviation.  Three in four have a high-pass of one pole, one
    in four another one, one in two a low-pass; one in four is held with swapped hands.
    """
    B, _, T = x.shape

    def cutoff_hz(low: float, high: float, share: float, harmless: float) -> torch.Tensor:
        """(B, 1, 1), even on a logarithmic scale; only a share of the records gets one."""
        exponent = math.log(low) + math.log(high / low) * torch.rand(B, 1, 1, generator=draw)
        is_met = torch.rand(B, 1, 1, generator=draw) < share
        return torch.where(is_met, exponent.exp(), harmless)

    frequency_hz = torch.fft.rfftfreq(T, 1 / sample_rate_hz)  # (T // 2 + 1,)
    drift = low_pass(frequency_hz, cutoff_hz(0.2, 1.5, 1, harmless=math.nan))
    wander = torch.fft.irfft(torch.fft.rfft(torch.randn(x.shape, generator=draw)) * drift, n=T)
    wander = wander / wander.std(2, keepdim=True)
    size = torch.rand(B, 1, 1, generator=draw) * (torch.rand(B, 1, 1, generator=draw) < 0.5)
    x = x + (size * wander).to(x)

    response = high_pass(frequency_hz, cutoff_hz(0.05, 1, 0.75, harmless=1e-3))
    response = response * high_pass(frequency_hz, cutoff_hz(0.05, 0.5, 0.25, harmless=1e-3))
    response = response * low_pass(frequency_hz, cutoff_hz(10, 45, 0.5, harmless=math.inf))
    is_swapped = torch.rand(B, 1, 1, generator=draw) < 0.25
    response = torch.where(is_swapped, -response, response)
    return torch.fft.irfft(torch.fft.rfft(x) * response.to(x.device), n=T)


def high_pass(frequency_hz: torch.Tensor, cutoff_hz: torch.Tensor) -> torch.Tensor:
    """Complex response of a capacitor and a resistor, which bends slow waves.

    Under a discrete Fourier transform the end of a record acts on its beginning; so does, in a real
    recording, what came before it.
    """
    return 1j * frequency_hz / (cutoff_hz + 1j * frequency_hz)


def low_pass(frequency_hz: torch.Tensor, cutoff_hz: torch.Tensor) -> torch.Tensor:
    """A Butterworth filter of second order, forward and back (-6 dB): nothing is delayed."""
    return 1 / (1 + (frequency_hz / cutoff_hz) ** 4)


def main(config: RecorderConfig) -> dict:
    _, _, spec = train_pretrain.open_encoders(config)
    found = dict(lead=spec.lead, **spec.preprocessing)
    if found != INPUT:
        raise UsageError(f"--multi, --single: made for {selfmis.as_flags(found)}; {ONLY}")
    return train_pretrain.main(config, RecorderTraining)


if __name__ == "__main__":
    selfmis.run_script(main, RecorderConfig, __doc__)
