"""Pre-training on synthetic ECG: holes and statements (second half of arXiv 2506.23259).

    python -m extras.baselines.synthetic_pretraining --data synthetic:15000 --out runs/joint
    python train_probe.py --data ptb-xl --finetune --encoder runs/joint/best.pt --fractions 0.05

Only the abstract of that paper could be read: recurrent networks and transformers, masked
autoencoding, and a loss that joins reconstruction and classification.  Every number here is ours.

Ten seconds at 100 Hz are 50 tokens of 200 ms.  Of each record 20 are masked, in all leads at once,
so that no lead gives another away.  With a = --alpha the loss is

    a * squared error of the masked patches + (1 - a) * cross-entropy of the 44 statements,

both from the same masked input: a mean over samples, a sum over statements.  1 is masked
autoencoding, for which no label is read, 0 supervision alone, the control that tells whether
filling holes does anything.
--data may name real records instead; those without a statement count in the first term only.

To a probe nothing is masked, and the embedding is the mean of the tokens.  --untrained writes a
network with random weights, so that train_probe.py --finetune can train such a one from scratch.
synthetic_table.py compares all of these.
"""

import dataclasses

import torch
import torch.nn as nn

import selfmis
import train_pretrain
from extras.baselines import common
from extras.baselines.common import BaselineConfig, BaselineTraining, Method, to_view, zscore
from extras.baselines.losses import statement_loss
from extras.baselines.st_mem import make_layers, time_code
from extras.baselines.transformer import Encoder
from selfmis import SIZES, STATEMENTS, ResNet1D, UsageError, flag

TOKENS = 50  # of a record of ten seconds
PATCH = 20  # samples of a lead in a token, at 100 Hz
MASKED = 20  # tokens of each record
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclasses.dataclass
class SyntheticPretrainingConfig(BaselineConfig):
    out: str = flag("runs/synthetic_pretraining", "folder of the run", metavar="DIR")
    size: str = flag("small", "there is no published one", choices=("small",))
    leads: int = flag(1, "what it sees: lead I, or twelve leads", choices=(1, 12))
    network: str = flag(
        "transformer",
        "of tokens, or this repository's ResNet1D",
        choices=("transformer", *CELLS, "resnet"),
    )
    alpha: float = flag(0.5, "weight of filling holes; that of the labels is 1 - alpha")
    untrained: bool = flag(False, "write the network with random weights and train nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_rate not in (None, 100):
            raise UsageError(f"--sample-rate {self.sample_rate:g}: its patches are for 100 Hz")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"--alpha {self.alpha:g}: expected a number from 0 to 1")
        if self.network == "resnet" and self.alpha > 0:
            raise UsageError("--network resnet: it has no tokens to mask; give --alpha 0")


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


class PatchEncoder(Encoder):
    """(B, leads, 1000) -> (B, D): the mean over tokens that know each other.

    A token is what all leads show in 200 ms.
    """

    def __init__(self, leads: int, embedding_dim: int, *, width: int, **architecture) -> None:
        super().__init__(leads, embedding_dim, width=width, **architecture)
        self.embed = nn.Linear(leads * PATCH, width)

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, 1000) -> (B, 50, L * 20), lead after lead."""
        return x.unflatten(2, (TOKENS, PATCH)).transpose(1, 2).flatten(2)

    def contextualise(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, 50, width) -> (B, 50, D)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.contextualise(self.embed(self.patches(x)))  # (B, 50, D)
        return tokens.float().mean(1)


class PatchRecurrent(PatchEncoder):
    """Two recurrent layers that read the tokens forwards and backwards; D is twice the width."""

    def __init__(self, leads: int, *, cell: str, width: int = 256, layers: int = 2) -> None:
        super().__init__(leads, 2 * width, width=width, cell=cell, layers=layers)
        self.norm = nn.LayerNorm(width)
        self.recurrent = CELLS[cell](width, width, layers, batch_first=True, bidirectional=True)
        # Without norm and with torch's small weights statements stay at chance for 500 steps.
        for name, parameter in self.recurrent.named_parameters():
            for gate in parameter.data.split(width):
                if "weight_hh" in name:
                    nn.init.orthogonal_(gate)
                elif "weight_ih" in name:
                    nn.init.xavier_uniform_(gate)
                else:
                    nn.init.zeros_(gate)

    def contextualise(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.recurrent(self.norm(tokens))[0]

    def train(self, mode: bool = True) -> "PatchRecurrent":
        """Without dropout both modes compute the same, but in eval mode cuDNN has no gradient."""
        super().train(mode)
        self.recurrent.train()
        return self


class TokenTransformer(PatchEncoder):
    """Five pre-norm layers of attention; D is the width."""

    def __init__(
        self,
        leads: int,
        *,
        width: int = 256,
        layers: int = 5,
        heads: int = 4,
        feed_forward: int = 1024,
    ) -> None:
        shape = dict(width=width, layers=layers, heads=heads, feed_forward=feed_forward)
        super().__init__(leads, width, **shape)
        self.layers = make_layers(**shape)
        self.norm = nn.LayerNorm(width)
        # Learned places left the loss at that of guessing for the first hundreds of steps.
        self.register_buffer("time_code", time_code(width, TOKENS)[1:-1], persistent=False)

    def contextualise(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.time_code
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


class SyntheticPretraining(Method):
    """Squared error of the masked patches and cross-entropy of the statements, weighed by alpha.

    A head whose term has no weight is not built: a parameter without a gradient would stop training
    in several processes.
    """

    def __init__(self, config: SyntheticPretrainingConfig) -> None:
        super().__init__(config)
        self.uses_labels = config.alpha < 1
        if isinstance(self.encoder, PatchEncoder):
            # What stands where a token is masked.
            self.hole = nn.Parameter(0.02 * torch.randn(self.encoder.embed.out_features))
        if config.alpha > 0:
            self.fill = nn.Linear(self.encoder.embedding_dim, self.encoder.embed.in_features)
        if config.alpha < 1:
            self.classify = nn.Linear(self.encoder.embedding_dim, len(STATEMENTS))

    @staticmethod
    def make_encoder(config: SyntheticPretrainingConfig) -> nn.Module:
        if config.network == "resnet":
            return ResNet1D(config.leads, **SIZES["small"])
        if config.network == "transformer":
            return TokenTransformer(config.leads)
        return PatchRecurrent(config.leads, cell=config.network)

    def forward(self, ecg, patients, draw, labels=None):
        view = zscore(to_view(ecg, self.config.leads))  # (B, L, 1000)
        if isinstance(self.encoder, ResNet1D):
            return statement_loss(self.classify(self.encoder(view)), labels), {}
        patches = self.encoder.patches(view)  # (B, 50, L * 20)
        is_masked = random_mask(len(patches), draw).to(patches.device)  # (B, 50)
        tokens = torch.where(is_masked[..., None], self.hole, self.encoder.embed(patches))
        tokens = self.encoder.contextualise(tokens)  # (B, 50, D)
        alpha = self.config.alpha
        loss, numbers = 0, {}
        if alpha > 0:
            errors = (self.fill(tokens).float() - patches).square()  # (B, 50, L * 20)
            numbers["reconstruction"] = errors[is_masked].mean()
            loss = loss + alpha * numbers["reconstruction"]
        if alpha < 1:
            logits = self.classify(tokens.float().mean(1))  # (B, 44)
            numbers["classification"] = statement_loss(logits, labels)
            loss = loss + (1 - alpha) * numbers["classification"]
        return loss, numbers

    @staticmethod
    def next_command(run: BaselineTraining) -> str:
        return train_pretrain.next_command(run).replace(".py", ".py --finetune", 1)

    def legend(self) -> str:
        if self.config.alpha == 0:
            return ""
        return "reconstruction: 1 is that of guessing the record's mean"


def random_mask(records: int, draw: torch.Generator) -> torch.Tensor:
    """(B, 50) bool: 20 tokens of each record, other ones in each."""
    order = torch.rand(records, TOKENS, generator=draw).argsort(1)
    return order < MASKED


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def main(config: SyntheticPretrainingConfig) -> None:
    if config.untrained:
        save_untrained(config)
    else:
        common.main(SyntheticPretraining, config)


def save_untrained(config: SyntheticPretrainingConfig) -> None:
    """best.pt of a network with random weights, a function of --seed; it has seen no data."""
    config = common.with_budget(config, SyntheticPretraining)
    ranks = selfmis.join_ranks(config.device, config.seed)
    out = selfmis.open_run(config)
    if config.resume and (out / "best.pt").exists():
        ranks.print(f"{out}: finished already")
        return
    spec = common.input_spec(config, SyntheticPretraining.normalize)
    selfmis.begin_run(out, config, dict(input=spec._asdict()), ranks)
    if ranks.is_main:
        content = selfmis.encoder_content(SyntheticPretraining.make_encoder(config), spec, [])
        content |= dict(kind="baseline", config=vars(config))
        selfmis.save(out / "best.pt", content | selfmis.environment())


if __name__ == "__main__":
    selfmis.run_script(main, SyntheticPretrainingConfig, __doc__)
