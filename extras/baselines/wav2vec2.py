"""Wav2Vec 2: tell which quantised piece of the ECG belongs in a hole.

    python -m extras.baselines.wav2vec2 --data ptb-xl --size small --out runs/w2v

Of a random segment of five seconds half of the tokens, in spans of 320 ms (`--size small`: at 100
Hz), are replaced by one learned vector.  What the transformer puts in a hole must be nearer to the
quantised latent that was there than to K quantised latents of other holes of the same segment.  The
quantiser picks one codeword in each of two groups by a Gumbel softmax; a diversity term keeps its
codebook in use.  After Baevski et al. 2020 (arXiv 2006.11477).

Departures from the published form: the temperature of the Gumbel softmax reaches 0.5 after 70 % of
the run, whatever its length; the batch of all processes counts in the diversity term; records are
z-scored, where the published ones stay in millivolts; the dropouts of the projected and of the
quantised latents are left out.  And common.py's schedule.
"""

import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from extras.baselines.common import BaselineConfig, Method, random_segment, run_baseline, to_view
from extras.baselines.common import zscore
from extras.baselines.losses import gather, similarities
from selfmis import UsageError, flag

MASKED_SHARE = 0.65  # of the tokens, were the spans not to overlap
GROUPS = 2
QUANTISERS = {  # codewords of a group, their width, tokens of a span, distractors
    "published": dict(codewords=320, width=128, span=10, distractors=100),
    "small": dict(codewords=64, width=64, span=2, distractors=20),
}


@dataclasses.dataclass
class Wav2Vec2Config(BaselineConfig):
    out: str = flag("runs/wav2vec2", "folder of the run", metavar="DIR")


class Wav2Vec2(Method):
    """Masked prediction of quantised latents."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        shape = QUANTISERS[config.size]
        self.span = shape["span"]
        self.distractors = shape["distractors"]
        D = self.encoder.embedding_dim
        Q = GROUPS * shape["width"]
        self.hole = nn.Parameter(torch.rand(D))  # what stands where a token is masked
        self.quantiser = Quantiser(shape["codewords"], shape["width"])
        self.project_target = nn.Linear(Q, Q)
        self.project_context = nn.Linear(D, Q)

    def forward(self, ecg, patients, draw):
        view = zscore(to_view(ecg, self.config.leads))
        loss, _, numbers = self.fill_holes(random_segment(view, draw), draw)
        return loss, numbers

    def fill_holes(
        self, x: torch.Tensor, draw: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(B, L, T) -> the loss, the last layer with holes (B, N, D), and numbers worth a look."""
        latents = self.encoder.latents(x).float()  # (B, N, 256)
        normed = self.encoder.latent_norm(latents)
        tokens = self.encoder.project(normed)  # (B, N, D)
        B, N, _ = tokens.shape
        is_masked = mask_spans(B, N, self.span, draw).to(x.device)
        tokens = torch.where(is_masked[..., None], self.hole.to(tokens), tokens)
        context = self.encoder.contextualise(tokens)

        targets, codes, usage = self.quantiser(masked_rows(normed, is_masked), self.temperature())
        predicted = self.project_context(masked_rows(context, is_masked))  # (B, M, Q)
        logits = contrast(predicted, self.project_target(targets), codes, self.distractors, draw)
        cross_entropy = -logits.log_softmax(-1)[..., 0].mean()
        diversity = 1 - perplexity(usage) / self.quantiser.size
        loss = cross_entropy + 0.1 * diversity + 10 * latents.square().mean()
        chosen = F.one_hot(codes, usage.shape[1]).float().mean((0, 1))  # (G, V)
        numbers = dict(
            cross_entropy=cross_entropy,
            code_perplexity=perplexity(chosen),
            equal_distractors=logits[..., 1:].isinf().float().mean(),
        )
        return loss, context, {name: value.detach() for name, value in numbers.items()}

    def temperature(self) -> float:
        """Of the Gumbel softmax: from 2 down to 0.5 at 70 % of the run, and then 0.5."""
        return 2 * 4 ** -min(1, self.progress / 0.7)

    def legend(self) -> str:
        chance = math.log(self.distractors + 1)
        return f"cross_entropy: chance {chance:.2f}; code_perplexity: at most {self.quantiser.size}"

    def check(self, metrics: dict) -> None:
        if metrics.get("code_perplexity", math.inf) < 2 * GROUPS:
            equal = f"{metrics['equal_distractors']:.0%} of the distractors equal their target"
            raise UsageError(
                f"the codebook has collapsed: code perplexity {metrics['code_perplexity']:.1f}, "
                f"below {2 * GROUPS}, and {equal}; try a lower --lr"
            )


class Quantiser(nn.Module):
    """A codeword of each group for every latent."""

    def __init__(self, codewords: int, width: int) -> None:
        super().__init__()
        self.size = GROUPS * codewords
        self.choose = nn.Linear(256, self.size)
        self.codewords = nn.Parameter(torch.rand(GROUPS, codewords, width))
        nn.init.normal_(self.choose.weight)
        nn.init.zeros_(self.choose.bias)

    def forward(
        self, latents: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, M, 256) -> codewords side by side (B, M, G W), which (B, M, G), usage (G, V).

        Usage is the mean softmax over the batch of all processes.  In training the choice is noisy,
        and its gradient that of a softmax; in eval the likeliest codewords are taken.
        """
        with torch.autocast(latents.device.type, enabled=False):  # bf16 would blur the choice
            logits = self.choose(latents.float()).unflatten(-1, (GROUPS, -1))  # (B, M, G, V)
        usage = logits.softmax(-1).mean((0, 1))  # (G, V), of this process
        usage = gather(usage[None]).mean(0)
        if self.training:
            chosen = F.gumbel_softmax(logits, temperature, hard=True)  # one-hot
            codes = chosen.argmax(-1)
        else:
            codes = logits.argmax(-1)
            chosen = F.one_hot(codes, logits.shape[-1]).to(logits)
        words = torch.einsum("bmgv,gvw->bmgw", chosen, self.codewords)
        return words.flatten(2), codes, usage


def perplexity(p: torch.Tensor) -> torch.Tensor:
    """(G, V) probabilities -> how many codewords are in use, summed over groups: G to G V."""
    return torch.special.entr(p).sum(1).exp().sum()


def mask_spans(B: int, N: int, span: int, draw: torch.Generator) -> torch.Tensor:
    """(B, N) bool: spans of tokens, which may overlap, and equally many tokens in every row.

    As published no span starts at the last possible place, so the last token is never masked.
    """
    count = max(2, int(MASKED_SHARE * N / span + torch.rand(1, generator=draw).item()))
    if N - span < count:
        raise UsageError(
            f"--sample-rate: {N} tokens in five seconds are too few; give a higher one"
        )
    starts = torch.rand(B, N - span, generator=draw).argsort(1)[:, :count]  # (B, count)
    is_masked = torch.zeros(B, N, dtype=torch.bool)
    for offset in range(span):
        is_masked.scatter_(1, starts + offset, True)
    fewest = int(is_masked.sum(1).min())
    keys = torch.rand(B, N, generator=draw).where(is_masked, -1)
    kept = keys.topk(fewest, dim=1).indices  # of those that are masked, any
    return torch.zeros_like(is_masked).scatter_(1, kept, True)


def masked_rows(x: torch.Tensor, is_masked: torch.Tensor) -> torch.Tensor:
    """(B, N, D) -> (B, M, D), the M masked tokens of each segment."""
    return x[is_masked].unflatten(0, (len(x), -1))


def contrast(
    predicted: torch.Tensor,
    targets: torch.Tensor,
    codes: torch.Tensor,
    count: int,
    draw: torch.Generator,
) -> torch.Tensor:
    """Each hole against its own target and `count` targets of other holes of its segment.

    predicted, targets: (B, M, Q); codes: (B, M, G), equal where targets are.  Returns logits
    (B, M, 1 + count), the own target first; a distractor equal to it is -inf.
    """
    logits = similarities(predicted, targets)  # (B, M, M)
    M = logits.shape[1]
    is_equal = (codes[:, :, None] == codes[:, None]).all(-1)  # (B, M, M)
    others = torch.randint(M - 1, (len(codes), M, count), generator=draw)
    others = others + (others >= torch.arange(M)[:, None])  # never the hole itself
    distractors = logits.masked_fill(is_equal, -torch.inf).gather(2, others.to(codes.device))
    own = logits.diagonal(dim1=1, dim2=2)[..., None]  # (B, M, 1)
    return torch.cat([own, distractors], -1)


if __name__ == "__main__":
    run_baseline(Wav2Vec2, Wav2Vec2Config, __doc__)
