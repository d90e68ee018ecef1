"""Supervised on random halves: what labels alone reach on lead I.

    python -m extras.baselines.crops --data ptb-xl --out runs/crops

A record is never seen twice as it was: each epoch shows another five seconds of it at another gain.
Sixteen epochs of halves cost as much as the eight of whole records that the other methods have.
Optimiser and schedule are theirs (AdamW, batches of 128, a rate of 1e-3, weights of the last
epoch), where train_probe.py --finetune has Adam, 64, 5e-4 and the best epoch of the validation
fold: the two differ in more than the halves.  Not in the paper, whose supervised rows see whole
records.
"""

import dataclasses

import torch
import torch.nn as nn

from extras.baselines.common import SMALL_BUDGET, BaselineConfig, Method, random_segment
from extras.baselines.common import run_baseline, to_view, zscore
from extras.baselines.losses import statement_loss
from selfmis import SIZES, STATEMENTS, ResNet1D, flag

GAIN = 0.2  # deviation of its logarithm


@dataclasses.dataclass
class CropsConfig(BaselineConfig):
    out: str = flag("runs/crops", "folder of the run", metavar="DIR")
    size: str = flag("small", "there is no published one", choices=("small",))
    leads: int = flag(1, "what it sees: lead I, or twelve leads", choices=(1, 12))


class Crops(Method):
    """Cross-entropy of the 44 statements of a random half."""

    small = SMALL_BUDGET | dict(epochs=16, lr=1e-3)
    uses_labels = True

    def __init__(self, config: CropsConfig) -> None:
        super().__init__(config)
        self.classify = nn.Linear(self.encoder.embedding_dim, len(STATEMENTS))

    @staticmethod
    def make_encoder(config: CropsConfig) -> ResNet1D:
        return ResNet1D(config.leads, **SIZES["small"])

    def forward(self, ecg, patients, draw, labels):
        half = random_half(zscore(to_view(ecg, self.config.leads)), draw)
        return statement_loss(self.classify(self.encoder(half)), labels), {}


def random_half(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Records (B, L, T) -> five seconds of each at another gain, (B, L, T // 2)."""
    gain = torch.exp(GAIN * torch.randn(len(x), 1, 1, generator=draw))
    return random_segment(x, draw) * gain.to(x)


if __name__ == "__main__":
    run_baseline(Crops, CropsConfig, __doc__)
