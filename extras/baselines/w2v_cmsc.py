"""W2V-CMSC: Wav2Vec 2 on both halves of a record, which are a pair besides, as in CLOCS.

    python -m extras.baselines.w2v_cmsc --data ptb-xl --size small --out runs/wc

Both halves have holes to fill (wav2vec2.py); the means over time of the last layer *with holes* are
the embeddings that InfoNCE pairs over the batch.  The two losses have equal weight.  With
--leads 12 some leads are blanked first, other ones in each half: what lets it live with lead I.
After Oh et al. 2022 (arXiv 2203.06889), with their random lead masking.

Departures from the published form: it blanks each lead with probability 1/2, and shows lead I alone
once in 4,096 halves; here the number of leads that stay is drawn from 1 to 12 (--published goes
back).  Other records of the same patient count as strangers.  And the departures of wav2vec2.py.
"""

import dataclasses

import torch

from extras.baselines.common import run_baseline, to_view, zscore
from extras.baselines.losses import gather, info_nce
from extras.baselines.simclr import blank_leads
from extras.baselines.transformer import halves
from extras.baselines.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from selfmis import flag


@dataclasses.dataclass
class W2VCMSCConfig(Wav2Vec2Config):
    out: str = flag("runs/w2v_cmsc", "folder of the run", metavar="DIR")
    published: bool = flag(False, "each lead is blanked with probability 1/2")


class W2VCMSC(Wav2Vec2):
    """Masked prediction, and InfoNCE between the two halves of a record."""

    def forward(self, ecg, patients, draw):
        view = torch.cat(halves(zscore(to_view(ecg, self.config.leads))))  # (2 B, L, T / 2)
        if self.config.leads == 12:
            blank = blank_leads if self.config.published else keep_some_leads
            view = blank(view, draw)
        loss, context, numbers = self.fill_holes(view, draw)
        first, second = context.float().mean(1).chunk(2)  # (B, D) each
        contrastive = info_nce(gather(first), gather(second))
        return loss + contrastive, numbers | dict(contrastive=contrastive.detach())


def keep_some_leads(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """(B, L, T) with 1 to L leads of each record left, any number equally often."""
    B, L, _ = x.shape
    kept = torch.randint(1, L + 1, (B, 1), generator=draw)
    places = torch.rand(B, L, generator=draw).argsort(1).argsort(1)  # a shuffle of 0 ... L - 1
    return x * (places < kept)[..., None].to(x)


if __name__ == "__main__":
    run_baseline(W2VCMSC, W2VCMSCConfig, __doc__)
