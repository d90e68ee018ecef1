"""CLOCS, contrastive learning over time (CMSC): the two halves of one record are a pair.

    python -m extras.baselines.clocs --data ptb-xl --size small --out runs/clocs

A record is z-scored, all its leads together, cut into two halves of five seconds, and InfoNCE over
the batch asks which second half belongs to which first half.  Published (Kiyasseh et al. 2021,
arXiv 2005.13249): one lead, three convolutions and a linear layer; the SelfMIS paper's 90.37 M
parameters are those of the conv-transformer on twelve leads, and that is the network here.
Departures: the z-score; other records of the same patient in a batch count as strangers, where they
are pairs too as published; and common.py's schedule.

--self-cut is ours: each half shows, with probability 1/2, all leads or lead I alone, z-scored on
its own, beside eleven rows of zeros: a SelfMIS that needs neither labels nor a teacher.
"""

import dataclasses

import torch

from extras.baselines.common import ContrastiveConfig, ContrastiveMethod, run_baseline, to_view
from extras.baselines.common import zscore
from extras.baselines.losses import info_nce
from extras.baselines.transformer import halves
from selfmis import UsageError, flag, with_empty_leads


@dataclasses.dataclass
class ClocsConfig(ContrastiveConfig):
    out: str = flag("runs/clocs", "folder of the run", metavar="DIR")
    self_cut: bool = flag(False, "each half shows all leads or lead I alone, at random")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.self_cut and self.leads == 1:
            raise UsageError("--self-cut: it needs --leads 12")


class CLOCS(ContrastiveMethod):
    """InfoNCE between the two halves of a record."""

    def forward(self, ecg, patients, draw):
        views = halves(zscore(to_view(ecg, self.config.leads)))  # (B, L, T / 2) twice
        if self.config.self_cut:
            alone = with_empty_leads(zscore(to_view(ecg, 1)), self.encoder, "I")
            views = [
                choose(whole, cut, draw) for whole, cut in zip(views, halves(alone), strict=True)
            ]
        first, second = views
        return info_nce(self.embed(first), self.embed(second)), {}


def choose(whole: torch.Tensor, cut: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """(B, L, T): of each record one of the two, with equal probability."""
    is_cut = torch.rand(len(whole), 1, 1, generator=draw) < 0.5
    return torch.where(is_cut.to(whole.device), cut, whole)


if __name__ == "__main__":
    run_baseline(CLOCS, ClocsConfig, __doc__)
