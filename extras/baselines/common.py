"""What all baselines share: settings, the training loop, checkpoints, views.

A baseline is a `Method`: it makes its views of a batch of twelve-lead records, embeds them and
returns its loss.  All else is train_pretrain.py's: the same cache, steps, losses that must stay
finite, progress lines and --resume.  Labels are handed to a method only if it says that it uses
them, and its checkpoint then says so too.

The budget of `--size small` is, where a method's file says nothing else, the same: 100 Hz, 8 epochs
in batches of 128 (under torchrun of each process: give --batch-size), AdamW, weight decay 0.01, 50
steps of warm-up, then a cosine to 0, and gradients clipped at 1.  Without it size, epochs, rate,
and the batch of one of several processes (eight, in fairseq-signals) are the published ones; cosine
and clipping stay, where those published with a constant rate have neither.  OUT/best.pt has the
weights of the last finished epoch, under the name that probes expect.
"""

import dataclasses
import math
import os
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn

import selfmis
import train_pretrain
from extras.baselines.losses import gather
from extras.baselines.transformer import CONV_SIZES, ConvTransformer
from extras.synthetic import DERIVED, INDEPENDENT_ROWS
from selfmis import LEADS, SIZES, Config, InputSpec, Ranks, ResNet1D, UsageError, flag
from selfmis import lead_index
from train_pretrain import Training

SMALL_BUDGET = dict(
    sample_rate=100.0, epochs=8, batch_size=128, lr=5e-4, warmup=50, weight_decay=0.01
)
PUBLISHED_BUDGET = dict(
    sample_rate=500.0, epochs=200, batch_size=64, lr=5e-5, warmup=0, weight_decay=0.01
)


@dataclasses.dataclass
class BaselineConfig(Config):
    """Flags of every baseline; None: follows from --size."""

    out: str = flag("runs/baseline", "folder of the run", metavar="DIR")
    size: str = flag("published", "of the network and its budget", choices=("small", "published"))
    leads: int = flag(
        12, "what it sees: twelve leads, as published, or lead I alone", choices=(1, 12)
    )
    sample_rate: float | None = flag(None, "in Hz (small: 100, else 500)")
    epochs: int | None = flag(None, "passes over the records (small: 8 in most, else as published)")
    batch_size: int | None = flag(None, "records of one process (small: 128, else as published)")
    lr: float | None = flag(None, "peak rate, cosine to 0 (small: 5e-4 in most, else as published)")
    warmup: int | None = flag(None, "steps of linear warm-up (small: 50, of generators 0)")
    weight_decay: float | None = flag(None, "of AdamW (small: 0.01, of generators 0)")
    val_records: int = flag(5000, "the last N records of a list without folds validate")
    save_seconds: float = flag(600.0, "between two saves of last.pt within an epoch")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lead is not None:
            raise UsageError(f"--lead {self.lead}: give --leads 1 for lead I, --leads 12 for all")
        if self.compile:
            raise UsageError("--compile: not for a baseline, whose encoder is called in parts")
        if self.normalize is not None:
            raise UsageError("--normalize: each method has its own way; leave it out")

    def demonstration(self) -> dict:
        processes = int(os.environ.get("WORLD_SIZE", 1))
        return dict(data=["synthetic:3000"], size="small", batch_size=max(1, 128 // processes))

    demonstrates = "a demonstration on synthetic ECG"
    loss: ClassVar[str] = ""  # none of train_pretrain.py's, whose progress lines ask for it


@dataclasses.dataclass
class ContrastiveConfig(BaselineConfig):
    """Flags of simclr, three_kg and clocs, whose views any network can embed."""

    network: str = flag(
        "transformer",
        "as published, or this repository's ResNet1D: the objective apart from the network",
        choices=("transformer", "resnet"),
    )


class Method(nn.Module):
    """An encoder and how it is pre-trained.

    `encoder`, (B, leads, T) -> (B, D), is what a probe reads, or a generator; everything else
    serves the loss and is thrown away.
    """

    small: ClassVar[dict] = SMALL_BUDGET
    published: ClassVar[dict] = PUBLISHED_BUDGET
    betas: ClassVar[tuple[float, float]] = (0.9, 0.98)
    normalize: ClassVar[str] = "zscore"  # of what the encoder sees
    progress: float = 0.0  # share of the training that is done, for what changes in its course
    uses_labels: bool = False  # True: `forward` gets those of the batch, (B, 44) of 0 and 1, last

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = self.make_encoder(config)

    @staticmethod
    def make_encoder(config: BaselineConfig) -> nn.Module:
        return ConvTransformer(config.leads, **CONV_SIZES[config.size])

    def forward(
        self, ecg: torch.Tensor, patients: torch.Tensor, draw: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and numbers worth a look.

        ecg: (B, 12, T) in mV.  patients: (B,) int64.  draw: every random number of a view comes
        from it, and it is a function of (seed, epoch, step, process), so that a resumed run sees
        the same views.
        """
        raise NotImplementedError

    def legend(self) -> str:
        """What a reader must know of the numbers, e.g. what chance is; one line."""
        return ""

    @staticmethod
    def next_command(run: "BaselineTraining") -> str:
        """What to start when the run is over."""
        return f"{train_pretrain.next_command(run)} --lead I"

    def check(self, metrics: dict) -> None:
        """UsageError if the epoch's numbers show that training has failed."""


def rows_seen(config: BaselineConfig) -> list[int]:
    """The leads of which st_mem and heartlang make tokens: `small` takes the independent ones."""
    if config.leads == 1:
        return [lead_index("I")]
    return INDEPENDENT_ROWS if config.size == "small" else list(range(len(LEADS)))


class ContrastiveMethod(Method):
    """A method that compares embeddings of five seconds, in either network."""

    @staticmethod
    def make_encoder(config: ContrastiveConfig) -> nn.Module:
        if config.network == "resnet":
            size = "small" if config.size == "small" else "ecgfounder"
            return ResNet1D(config.leads, **SIZES[size])
        return Method.make_encoder(config)

    def embed(self, view: torch.Tensor) -> torch.Tensor:
        """Five seconds of this process's records (B, L, T) -> embeddings of all processes."""
        is_resnet = isinstance(self.encoder, ResNet1D)
        z = self.encoder(view) if is_resnet else self.encoder.embed_segment(view)
        return gather(z)  # (W B, D)


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


def to_view(ecg: torch.Tensor, leads: int) -> torch.Tensor:
    """(B, 12, T) -> (B, leads, T): all of them, or lead I alone."""
    if leads == 1:
        return ecg[:, lead_index("I"), None]
    return ecg


def zscore(x: torch.Tensor) -> torch.Tensor:
    """(B, L, T) minus its mean, over its deviation, all leads together.

    As `preprocess` does it for ten seconds; the zeros behind a shorter record count, too.
    """
    deviation = x.std((1, 2), correction=0, keepdim=True)
    deviation = torch.where(deviation > 0, deviation, 1)  # a flat view stays flat
    return (x - x.mean((1, 2), keepdim=True)) / deviation


def random_segment(
    ecg: torch.Tensor, draw: torch.Generator, length: int | None = None
) -> torch.Tensor:
    """A piece from anywhere, by default five seconds: (B, L, T) -> (B, L, length)."""
    B, L, T = ecg.shape
    length = length or T // 2
    start = torch.randint(T - length + 1, (B, 1, 1), generator=draw)
    columns = (start + torch.arange(length)).to(ecg.device)  # (B, 1, length)
    return ecg.gather(2, columns.expand(B, L, -1))


def recompute_limbs(ecg: torch.Tensor) -> torch.Tensor:
    """(B, 12, T) with III, aVR, aVL and aVF as they follow from I and II."""
    recomputed = ecg.clone()
    for lead, (of_one, of_two) in DERIVED.items():
        recomputed[:, LEADS.index(lead)] = of_one * ecg[:, 0] + of_two * ecg[:, 1]
    return recomputed


# --------------------------------------------------------------------------------------------------
# Training: train_pretrain.py's, with another loss
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class BaselineTraining(Training):
    """train_pretrain.py's run, whose steps are those of a Method."""

    kind = "baseline"

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return len(self.train_rows) // (self.config.batch_size * self.ranks.world_size)

    @property
    def can_validate(self) -> bool:
        """Whether the validation records fill a batch."""
        return len(self.val_rows) >= self.config.batch_size * self.ranks.world_size

    def step_loss(self, rows: np.ndarray, signals, targets) -> torch.Tensor:
        config, ranks = self.config, self.ranks
        self.model.progress = (self.epoch + self.step / self.steps) / config.epochs
        key = (config.seed, self.epoch, self.step, ranks.rank)
        torch.manual_seed(random_stream(*key, 1).initial_seed())  # dropout takes no generator
        return self.learner.forward(*self.inputs(rows, signals, random_stream(*key)))[0]

    def inputs(self, rows: np.ndarray, signals: torch.Tensor, draw: torch.Generator) -> list:
        """What the method's `forward` gets for these records."""
        inputs = [signals, self.patients(rows), draw]
        if self.model.uses_labels:
            inputs.append(self.pairs.on_device(self.pairs.dataset.records.labels[rows]))
        return inputs

    def patients(self, rows: np.ndarray) -> torch.Tensor:
        """(B,) int64, different for patients of different collections."""
        keys = self.pairs.dataset.records[rows].patient_keys()
        return torch.from_numpy(keys).to(self.ranks.device)


def random_stream(*key: int) -> torch.Generator:
    """A stream of random numbers that is a function of these."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed))


def with_budget(config: BaselineConfig, method_class: type[Method]) -> BaselineConfig:
    """The settings with what follows from --size, where no flag says otherwise."""
    budget = method_class.small if config.size == "small" else method_class.published
    missing = {name: value for name, value in budget.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def input_spec(config: BaselineConfig, normalize: str) -> InputSpec:
    """How a probe shows a record to the encoder."""
    lead = "I" if config.leads == 1 else "all"
    preprocessing = dict(normalize=normalize, filter=config.filter or "none")
    return InputSpec(lead, config.sample_rate, preprocessing)


def main(method_class: type[Method], config: BaselineConfig) -> dict:
    """Pre-train by one method; returns the last epoch's line of log.jsonl."""
    return pretrain(method_class, config, selfmis.join_ranks(config.device, config.seed))


def pretrain(
    method_class: type[Method], config: BaselineConfig, ranks: Ranks, *parts: nn.Module
) -> dict:
    """As `main`; `parts` go to the method's constructor."""
    config = with_budget(config, method_class)
    out = selfmis.open_run(config)
    spec = input_spec(config, method_class.normalize)
    records = selfmis.gather_records(config, spec.sample_rate_hz, train_pretrain.SYNTHETIC_STREAM)
    train_rows, val_rows = train_pretrain.split(records, config, ranks)
    last = selfmis.read_last(config, out, ranks)
    if last is not None and last["epoch"] == config.epochs:
        ranks.print(f"{out}: finished already")
        return last["last_entry"]

    # Views are made in mV out of all leads, and z-scored afterwards.
    cached = spec._replace(lead="all", preprocessing=spec.preprocessing | dict(normalize="none"))
    rows = np.concatenate([train_rows, val_rows])
    pairs = selfmis.read_pairs(config, records, rows, cached, ranks)
    torch.manual_seed(config.seed)  # whatever ran before, such as HeartLang's first stage
    method = method_class(config, *parts)
    run = prepare(method, config, ranks, out, spec, pairs, train_rows, val_rows)
    if run.model.uses_labels and not records.labels[run.train_rows].any():
        raise UsageError("--data: no record that trains has a label, from which this method learns")
    if last is None:
        selfmis.begin_run(out, config, describe(run), ranks)
        train_pretrain.save_last(run)
    else:
        train_pretrain.resume(run, last)
    while run.epoch < config.epochs:
        train_pretrain.train_one_epoch(run)
        metrics = validate(run)
        run.model.check(metrics)  # before anything is saved
        finish_epoch(run, metrics)
    if run.model.next_command(run):
        ranks.print(f"next: {run.model.next_command(run)}")
    return run.last_entry


def prepare(method, config, ranks, out, spec, pairs, train_rows, val_rows) -> BaselineTraining:
    """As train_pretrain.py's, without a teacher."""
    train_rows, val_rows = train_pretrain.usable_rows(pairs, train_rows, val_rows, config, ranks)
    method.to(ranks.device)
    records = pairs.dataset.records
    seen = selfmis.training_data(records[train_rows], records[:0], labels=method.uses_labels)
    return BaselineTraining(
        config=config,
        ranks=ranks,
        out=out,
        spec=spec,
        pairs=pairs,
        train_rows=train_rows,
        val_rows=val_rows,
        model=method,
        learner=selfmis.Learner(method, make_optimizer(method, config), config, ranks),
        training_data=seen,
        val_targets=torch.empty(0),
        teacher_digest="",
    )


def make_optimizer(method: Method, config: BaselineConfig) -> torch.optim.Optimizer:
    groups = [dict(params=list(method.parameters()), peak=config.lr)]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=method.betas, eps=1e-6, weight_decay=config.weight_decay
    )


def describe(run: BaselineTraining) -> dict:
    """Say what is going to happen, and return it for config.json."""
    config, ranks = run.config, run.ranks
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    labels = "their labels are used" if run.model.uses_labels else "no label is used"
    ranks.print(
        f"{type(run.model).__name__}: {parameters:,} parameters on {config.leads} lead(s), "
        f"{run.spec.sample_rate_hz:g} Hz, with {ranks.world_size} process(es) on "
        f"{ranks.device.type}, amp {run.learner.amp}\n{len(run.train_rows):,} records, "
        f"{run.steps:,} steps an epoch; {len(run.val_rows):,} validate; {labels}"
    )
    if not run.can_validate:
        ranks.print("warning: they fill no batch, so nothing is validated, nor a collapse noticed")
    if run.model.legend():
        ranks.print(run.model.legend())
    return dict(
        method=type(run.model).__name__,
        input=run.spec._asdict(),
        training_records=len(run.train_rows),
        steps=run.steps,
        unusable=selfmis.unusable_entry(run.pairs),
        world_size=ranks.world_size,
        amp=run.learner.amp,
    )


@torch.no_grad()
def validate(run: BaselineTraining) -> dict:
    """The method's own loss and numbers on the validation records, over whole batches."""
    config, ranks = run.config, run.ranks
    if not run.can_validate:
        return dict(val_loss=math.nan)
    fixed = dataclasses.replace(config, seed=0)
    batches = selfmis.epoch_batches(run.val_rows, fixed, 0, ranks)
    run.model.eval()
    values = []
    for step, (rows, (signals, _)) in enumerate(
        zip(batches, run.pairs.batches(batches), strict=True)
    ):
        draw = random_stream(0, 0, step, ranks.rank)
        loss, numbers = run.model(*run.inputs(rows, signals, draw))
        values.append({"val_loss": float(loss)} | {k: float(v) for k, v in numbers.items()})
    run.model.train()
    everybody = [value for part in ranks.gather_objects(values) for value in part]
    return {name: float(np.mean([value[name] for value in everybody])) for name in everybody[0]}


def finish_epoch(run: BaselineTraining, metrics: dict) -> None:
    """Count the epoch, keep its encoder, and say so."""
    train_loss = float(np.mean(run.losses))
    run.epoch += 1
    run.step = 0
    run.losses = []
    run.last_entry = dict(epoch=run.epoch, train_loss=train_loss, **metrics)
    run.last_entry["records_per_second"] = run.records_per_second
    if not run.ranks.is_main:
        return
    selfmis.append_log(run.out, run.last_entry)
    content = selfmis.encoder_content(run.model.encoder, run.spec, run.training_data)
    content |= dict(kind=run.kind, method=type(run.model).__name__)
    content |= dict(metrics=run.last_entry, config=vars(run.config))
    selfmis.save(run.out / "best.pt", content | selfmis.environment())
    train_pretrain.save_last(run)
    numbers = " | ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    text = f"epoch {run.epoch}/{run.config.epochs} | train loss {train_loss:.4f}"
    print(f"{text} | {numbers}", flush=True)


def run_baseline(method_class: type[Method], config_class, description: str) -> None:
    """The command line of a method's file."""
    selfmis.run_script(lambda config: main(method_class, config), config_class, description)
