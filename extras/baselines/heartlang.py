"""HeartLang: beats are words; learn a vocabulary, then predict masked words.

    python -m extras.baselines.heartlang --data ptb-xl --size small --out runs/hl

A word is a beat in one lead: the R peaks of lead I cut all leads at the mid-points between them, at
most 48 samples (at 100 Hz) before R and 48 from R on.  First `Vocabulary`, a run of its own in
OUT/words, learns to squeeze each word into one of V unit vectors, its code, and to draw it again.
Then `HeartLang` masks half of the words and predicts their codes from the others.  After Jin et al.
2025 (arXiv 2502.10707).

The embedding is the mean over words of the last layer.  To a probe an all-zero row is an absent
lead: it has no words.

Departures from the published form: padding is attended to by nobody and has no part in a loss; the
convolution over neighbours stays within a lead; codes are asked for with lead and time, as they
were learned; exactly half of the real words are masked; codes start as words, not by k-means, and
those that are not used for 100 steps start anew; the mean of the words is probed, not CLS, which no
loss trains; `--size small` sees the eight independent leads, and of each record the first 16 beats
where 21 are published: where more are found the end of the record is lost; a masked word is blank
before that convolution, not after it, which has shown it to its neighbours; of the dropouts those
of the attention and behind each half of a layer are left; gradients are clipped at 1, not 3, and
warm-up is 500 steps, not 5 epochs; where no R is found a record is cut every 96 samples.  And
common.py's schedule.
"""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import selfmis
from extras.baselines import common
from extras.baselines.common import PUBLISHED_BUDGET, SMALL_BUDGET, BaselineConfig, Method
from extras.baselines.common import rows_seen, to_view, zscore
from extras.baselines.transformer import Encoder, Layer
from selfmis import UsageError, flag, import_optional, lead_index

RATE_HZ = 100
BEAT = 96  # samples of a word
CENTRE = 48  # of these, where R is
IDLE_STEPS = 100  # a code that no word takes for so long starts anew

READERS = {  # of masked words
    "published": dict(width=768, layers=12, heads=8, feed_forward=1024),
    "small": dict(width=256, layers=6, heads=4, feed_forward=384),
}
VOCABULARIES = {
    "published": dict(
        encoder=dict(width=768, layers=4, heads=2, feed_forward=2048),
        decoder=dict(width=768, layers=2, heads=2, feed_forward=2048),
        codes=8192,
        code_width=128,
    ),
    "small": dict(
        encoder=dict(width=128, layers=2, heads=2, feed_forward=256),
        decoder=dict(width=128, layers=1, heads=2, feed_forward=256),
        codes=512,
        code_width=32,
    ),
}


@dataclasses.dataclass
class HeartLangConfig(BaselineConfig):
    out: str = flag("runs/heartlang", "folder of the run", metavar="DIR")
    vocabulary_epochs: int | None = flag(
        None,
        "passes for the vocabulary, which comes first and has a rate of its own "
        "(small: 2, else as published)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_rate not in (None, 100):
            raise UsageError(f"--sample-rate {self.sample_rate:g}: words are cut at 100 Hz")
        epochs = self.vocabulary_epochs
        if epochs is not None and epochs < 1:
            raise UsageError(f"--vocabulary-epochs {epochs}: expected a number above 0")


# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------


def find_beats(lead_I: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) at 100 Hz -> places of R (B, slots) int64, and which of them are real, bool.

    Where no R is found, the signal is cut every 96 samples.
    """
    processing = import_optional("wfdb.processing", "finding beats")
    places = torch.zeros(len(lead_I), slots, dtype=torch.int64)
    is_real = torch.zeros(len(lead_I), slots, dtype=torch.bool)
    for i, signal in enumerate(lead_I.cpu().double().numpy()):
        beats = processing.xqrs_detect(signal, RATE_HZ, verbose=False)[:slots]
        if len(beats) == 0:
            beats = range(CENTRE, len(signal), BEAT)[:slots]
        places[i, : len(beats)] = torch.as_tensor(beats)
        is_real[i, : len(beats)] = True
    return places, is_real


def cut_words(x: torch.Tensor, places: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """(B, R, T), places of R (B, S) -> words (B, R, S, 96), zero outside a beat and without one."""
    B, R, T = x.shape
    S = places.shape[1]
    # A beat reaches to the mid-points between its R and its neighbours', or to the ends.
    is_last = is_real & ~F.pad(is_real[:, 1:], (0, 1))
    middles = (places[:, 1:] + places[:, :-1]) // 2  # (B, S - 1)
    start = F.pad(middles, (1, 0))
    stop = torch.where(is_last, T, F.pad(middles, (0, 1), value=T))
    columns = places[..., None] - CENTRE + torch.arange(BEAT, device=x.device)  # (B, S, 96)
    inside = (columns >= start[..., None]) & (columns < stop[..., None]) & is_real[..., None]
    columns = columns.clamp(0, T - 1).flatten(1)[:, None].expand(B, R, -1)  # (B, R, S 96)
    return x.gather(2, columns).unflatten(2, (S, BEAT)) * inside[:, None]


class WordTransformer(nn.Module):
    """Words of each lead (B, R, S, C) -> (B, R, S, D), in two steps, `look` and `read`."""

    def __init__(
        self,
        channels: int,
        slots: int,
        *,
        width: int,
        layers: int,
        heads: int,
        feed_forward: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.neighbours = nn.Conv1d(channels, width, 3, padding=1, bias=False)
        self.cls = nn.Parameter(0.02 * torch.randn(width))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + slots, width))
        shape = dict(head_dim=64, pre_norm=True, qkv_bias=False, dropout=dropout)
        self.layers = nn.ModuleList(
            Layer(width, heads, feed_forward, **shape) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def look(self, words: torch.Tensor) -> torch.Tensor:
        """Each word beside its neighbours in its lead, (B, R, S, C) -> (B, R, S, D)."""
        B, R, S, _ = words.shape
        tokens = self.neighbours(words.flatten(0, 1).transpose(1, 2))  # (B R, D, S)
        tokens = tokens.transpose(1, 2).unflatten(0, (B, R))
        return tokens + self.positions[1 : 1 + R * S].unflatten(0, (R, S))

    def read(self, tokens: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """All words together, (B, R, S, D) and which are real (B, R, S) -> (B, R, S, D)."""
        B, R, S, D = tokens.shape
        cls = (self.cls + self.positions[0]).to(tokens).expand(B, 1, D)
        tokens = torch.cat([cls, tokens.flatten(1, 2)], 1)
        is_real = F.pad(is_real.flatten(1), (1, 0), value=True)
        for layer in self.layers:
            tokens = layer(tokens, is_real)
        return self.norm(tokens)[:, 1:].unflatten(1, (R, S))


class BeatTransformer(Encoder):
    """(B, leads, T) at 100 Hz -> (B, D), the mean over real words; `rows` are the leads it sees."""

    def __init__(
        self,
        leads: int,
        *,
        rows: list[int],
        beats: int,
        slots: int,
        width: int,
        layers: int,
        heads: int,
        feed_forward: int,
        dropout: float,
    ) -> None:
        shape = dict(width=width, layers=layers, heads=heads, feed_forward=feed_forward)
        shape["dropout"] = dropout
        rows = list(rows)
        super().__init__(leads, width, rows=rows, beats=beats, slots=slots, **shape)
        self.rows = rows
        self.beats = beats
        self.transformer = WordTransformer(BEAT, slots, **shape)
        # 16 each as published; 12 and 10 are in use.
        self.lead_vectors = nn.Parameter(0.02 * torch.randn(16, width))
        self.second_vectors = nn.Parameter(0.02 * torch.randn(16, width))

    def cut(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, leads, T) -> words (B, R, S, 96), places of R (B, S), real words (B, R, S)."""
        # One more beat than is kept, to end the last one.
        places, is_beat = find_beats(x[:, lead_index("I")], self.beats + 1)
        x = x[:, self.rows]
        words = cut_words(x, places.to(x.device), is_beat.to(x.device))[:, :, : self.beats]
        places, is_beat = (part[:, : self.beats].to(x.device) for part in (places, is_beat))
        is_there = (x != 0).any(2)  # (B, R)
        return words, places, is_there[..., None] & is_beat[:, None]

    def tokens(self, words: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(B, R, S, 96) -> (B, R, S, D), which know their lead and their second."""
        seconds = self.second_vectors[places // RATE_HZ][:, None]  # (B, 1, S, D)
        return self.transformer.look(words) + self.lead_vectors[self.rows][:, None] + seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words, places, is_real = self.cut(x)
        tokens = self.tokens(words, places)
        somewhere = is_real.any(2).any(0)  # leads that no record has cost no time
        is_real = is_real[:, somewhere]
        read = self.transformer.read(tokens[:, somewhere], is_real).float()
        total = (read * is_real[..., None]).sum((1, 2))
        return total / is_real.sum((1, 2)).clamp(min=1)[:, None]


def beat_transformer(config: BaselineConfig, shape: dict, dropout: float) -> BeatTransformer:
    """An encoder for the leads, beats and slots of these settings."""
    beats, slots = (16, 128) if config.size == "small" else (21, 256)
    layout = dict(rows=rows_seen(config), beats=beats, slots=slots)
    return BeatTransformer(config.leads, **layout, **shape, dropout=dropout)


def mean_of(values: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """Of the real words: two tensors (B, R, S) -> a number."""
    return (values * is_real).sum() / is_real.sum()


# --------------------------------------------------------------------------------------------------
# The vocabulary
# --------------------------------------------------------------------------------------------------


class Vocabulary(Method):
    """Each word is drawn again from the nearest of V codes."""

    published = PUBLISHED_BUDGET | dict(
        sample_rate=100.0, epochs=100, warmup=500, weight_decay=1e-4
    )
    small = SMALL_BUDGET | dict(epochs=2)
    betas = (0.9, 0.99)

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        shape = VOCABULARIES[config.size]
        D, C, V = shape["encoder"]["width"], shape["code_width"], shape["codes"]
        self.squeeze = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C))
        slots = self.encoder.architecture["slots"]
        self.decoder = WordTransformer(C, slots, **shape["decoder"])
        self.sketch = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, BEAT))
        self.register_buffer("codes", F.normalize(torch.randn(V, C), dim=1))
        # Steps without a word; so many at first that all codes start as words in the first step.
        self.register_buffer("idle", torch.full((V,), IDLE_STEPS))

    @staticmethod
    def make_encoder(config: BaselineConfig) -> BeatTransformer:
        return beat_transformer(config, VOCABULARIES[config.size]["encoder"], 0.0)

    def forward(self, ecg, patients, draw):
        words, places, is_real = self.encoder.cut(zscore(to_view(ecg, self.config.leads)))
        z = self.latents(words, places, is_real)
        if self.training:
            self.start_idle_codes(z[is_real].detach(), draw)
        indices = self.nearest(z)  # (B, R, S)
        codes = self.codes[indices]  # a copy: what moves now counts in the next step
        if self.training:
            self.move_codes(z[is_real].detach(), indices[is_real])
        passed = z + (codes - z).detach()  # the codes, with the gradient of z
        tokens = self.decoder.look(passed * is_real[..., None])
        drawn = self.sketch(self.decoder.read(tokens, is_real)).float()
        error = mean_of((drawn - words).square().mean(3), is_real)
        distance = mean_of((codes - z).square().mean(3), is_real)
        share = F.one_hot(indices[is_real], len(self.codes)).float().mean(0)
        numbers = dict(error=error.detach(), code_perplexity=torch.special.entr(share).sum().exp())
        return error + distance, numbers

    @staticmethod
    def next_command(run: common.BaselineTraining) -> str:
        return ""  # `train` goes on

    def latents(self, words, places, is_real) -> torch.Tensor:
        """Words (B, R, S, 96) -> unit vectors (B, R, S, C), in float32."""
        read = self.encoder.transformer.read(self.encoder.tokens(words, places), is_real)
        return F.normalize(self.squeeze(read).float(), dim=3)

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Unit vectors (..., C) -> the indices of their codes, (...) int64."""
        with torch.autocast(z.device.type, enabled=False):
            return (z @ self.codes.T).argmax(-1)

    def start_idle_codes(self, z: torch.Tensor, draw: torch.Generator) -> None:
        """Codes that no word has taken for long become words, the same in all processes."""
        is_idle = self.idle >= IDLE_STEPS
        chosen = torch.randint(len(z), (int(is_idle.sum()),), generator=draw)
        self.codes[is_idle] = z[chosen.to(z.device)]
        self.idle[is_idle] = 0
        if dist.is_initialized():
            dist.broadcast(self.codes, 0)

    def move_codes(self, z: torch.Tensor, nearest: torch.Tensor) -> None:
        """A hundredth of the way to the mean of the words (M, C) that took them: (M,) int64."""
        sums = torch.zeros_like(self.codes).index_add_(0, nearest, z)
        counts = torch.zeros_like(self.idle).index_add_(0, nearest, torch.ones_like(nearest))
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        is_used = counts > 0
        moved = F.normalize(0.99 * self.codes + 0.01 * F.normalize(sums, dim=1), dim=1)
        self.codes.copy_(torch.where(is_used[:, None], moved, self.codes))
        self.idle.copy_(torch.where(is_used, 0, self.idle + 1))

    def legend(self) -> str:
        return f"error: mean square, in scores; code_perplexity: at most {len(self.codes)}"


# --------------------------------------------------------------------------------------------------
# Masked words
# --------------------------------------------------------------------------------------------------


class HeartLang(Method):
    """Cross-entropy of the codes of masked words."""

    published = PUBLISHED_BUDGET | dict(sample_rate=100.0, lr=5e-4, warmup=500, weight_decay=0.05)
    small = SMALL_BUDGET | dict(epochs=6)

    def __init__(self, config: BaselineConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config)
        D = self.encoder.embedding_dim
        self.vocabulary = vocabulary.requires_grad_(False)
        self.hole = nn.Parameter(0.02 * torch.randn(D))  # what stands where a word is masked
        self.predict = nn.Linear(D, len(vocabulary.codes))

    @staticmethod
    def make_encoder(config: BaselineConfig) -> BeatTransformer:
        return beat_transformer(config, READERS[config.size], 0.1)

    def forward(self, ecg, patients, draw):
        words, places, is_real = self.encoder.cut(zscore(to_view(ecg, self.config.leads)))
        with torch.no_grad():
            codes = self.vocabulary.nearest(self.vocabulary.latents(words, places, is_real))
        is_masked = mask_half(is_real, draw)[..., None]  # (B, R, S, 1)
        # A masked word is blank, lest its neighbours' convolution gives it away.
        tokens = self.encoder.tokens(words.masked_fill(is_masked, 0), places)
        tokens = tokens + is_masked * self.hole.to(tokens)
        read = self.encoder.transformer.read(tokens, is_real)
        is_masked = is_masked[..., 0]
        logits = self.predict(read[is_masked]).float()  # (M, V)
        loss = F.cross_entropy(logits, codes[is_masked])
        accuracy = (logits.argmax(1) == codes[is_masked]).float().mean()
        return loss, dict(accuracy=accuracy)


def mask_half(is_real: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """(B, R, S) bool: half of each record's real words, rounded down, at random."""
    order = torch.rand(is_real.shape, generator=draw).to(is_real.device)
    order = order.masked_fill(~is_real, 2).flatten(1).argsort(1).argsort(1)  # real ones first
    half = is_real.sum((1, 2)) // 2
    return (order < half[:, None]).view_as(is_real)


def train(config: HeartLangConfig) -> dict:
    """The vocabulary, then HeartLang; both go on where they were with --resume."""
    ranks = selfmis.join_ranks(config.device, config.seed)
    selfmis.open_run(common.with_budget(config, HeartLang))  # refused now, not after the first run
    cache = str(selfmis.cache_folder(config))  # one for both
    own = dict(out=f"{config.out}/words", epochs=config.vocabulary_epochs, cache=cache)
    first = dataclasses.replace(config, **own, lr=None, warmup=None, weight_decay=None)
    common.pretrain(Vocabulary, first, ranks)
    ranks.barrier()  # the first process writes what all read now
    last = Path(first.out, "last.pt")
    vocabulary = Vocabulary(first)
    selfmis.load_strictly(vocabulary, selfmis.read_checkpoint(last)["model"], last)
    return common.pretrain(HeartLang, config, ranks, vocabulary)


if __name__ == "__main__":
    selfmis.run_script(train, HeartLangConfig, __doc__)
