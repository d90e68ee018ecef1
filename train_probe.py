"""How well lead I tells nine types of infarction apart (paper, 3.2, 3.3 and Table 8).

    python train_probe.py --encoder runs/pretrain/best.pt       # no data: synthetic ECG, seconds
    python train_probe.py --data ptb-xl --encoder runs/a/best.pt --out runs/a-probe
    python train_probe.py --data ptb-xl --finetune --lead all --out runs/teacher   # a teacher

Linear heads on the frozen encoder, or with --finetune encoder and head together.  Trains on all
folds but two and chooses on the validation fold; nothing is chosen by the test fold.  Writes
OUT/probe.pt, results.json, results.md, roc.png, predictions.npz and config.json; with --finetune
best.pt, last.pt and log.jsonl too.  --fractions 0.25 0.5 1 --seeds 5 is Table 3.
"""

import dataclasses
import io
import json
import math
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import selfmis
from selfmis import LEADS, MI_TYPES, SIX_TYPES, STATEMENTS, Config, InputSpec, Learner, Pairs
from selfmis import Ranks, Records, ResNet1D, UsageError, flag

SYNTHETIC_STREAM = 2  # seed of the synthetic records here; train_pretrain.py draws others
STRENGTHS = tuple(10.0 ** (2 - k / 2) for k in range(13))  # of the L2 penalty, strong to weak
GROUPS = {"nine": MI_TYPES, "six": SIX_TYPES, "diagnostic": STATEMENTS}  # each gets a mean
GROUP_NAMES = {"nine": "nine-type mean", "six": "six-type mean", "diagnostic": "all 44 statements"}
NINE = [STATEMENTS.index(t) for t in MI_TYPES]  # columns of labels and logits
NORM = STATEMENTS.index("NORM")
BASELINE = ", random encoder"  # how the names of heads on the baseline's features end
BASELINE_KEY = "_random_encoder"  # the same in predictions.npz
# Resamples of a handful of positives hardly differ: their interval would be falsely narrow.
MINIMUM_POSITIVES = 10


@dataclasses.dataclass
class ProbeConfig(Config):
    """Flags of train_probe.py; the defaults are Table 8's."""

    out: str = flag("runs/probe", "folder of the run", metavar="DIR")
    batch_size: int = flag(64, "records in a batch of one process")
    lr: float = flag(5e-4, "peak learning rate, cosine to 0")
    encoder: str = flag(
        "random", "an ECGFounder file, a checkpoint of ours, or random", metavar="PATH|random"
    )
    finetune: bool = flag(False, "train the encoder together with its head")
    head: str = flag(
        "both",
        "adam: the paper's; logistic: L2, solved to convergence; probe.pt holds the better one",
        choices=("adam", "logistic", "both"),
    )
    seeds: int = flag(1, "train the heads this often, from seed, seed + 1, ...")
    fractions: list[float] = flag(
        [1.0], "shares of the training records whose labels are used", nargs="+", metavar="F"
    )
    synthetic_only: bool = flag(False, "train on the synthetic records of --data alone")
    compare: list[str] = flag(
        [],
        "another run on the same test records: difference and paired interval; repeatable",
        action="append",
        metavar="RUN",
    )
    baseline: bool = flag(False, "probe a random encoder of the same size beside this one")
    patience: int = flag(5, "epochs without a better validation AUC before training stops")

    demonstrates = "a demonstration on synthetic ECG"

    def demonstration(self) -> dict:
        """As in train_pretrain.py, whose best.pt fits."""
        settings = dict(data=["synthetic:3000"])
        if self.encoder == "random":
            settings |= dict(size="small", sample_rate=100)
        elif not self.finetune:
            settings["baseline"] = True
        return settings

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            raise UsageError(f"--fractions {self.fractions}: expected shares above 0, at most 1")
        if self.baseline and self.encoder == "random":
            raise UsageError("--baseline: --encoder is random already")
        if not self.finetune and (self.compile or self.amp != "auto"):
            raise UsageError("--compile, --amp: a frozen encoder runs as it is, in float32")
        if self.finetune and self.head != "both":
            raise UsageError("--finetune trains a head of its own; probe its best.pt with --head")
        if self.finetune and (self.seeds > 1 or self.baseline or len(self.fractions) > 1):
            raise UsageError(
                "--finetune trains one network: repeat it with another --seed, --fractions and "
                "--out instead of --seeds, --baseline or several fractions"
            )


class TrainedHead(NamedTuple):
    """A linear head and what it says of the validation and test records."""

    name: str  # "adam", "logistic" or "finetune"; of the baseline "adam, random encoder" ...
    seed: int
    fraction: float
    weight: torch.Tensor  # (K, D)
    bias: torch.Tensor  # (K,)
    val_logits: np.ndarray  # (N, K)
    test_logits: np.ndarray  # (N, K)


def main(config: ProbeConfig) -> dict:
    """Probe or fine-tune; returns the content of results.json (in the first process)."""
    started = time.time()
    ranks = selfmis.join_ranks(config.device, config.seed)
    selfmis.import_optional("matplotlib.figure", "drawing roc.png")  # now, not after hours
    selfmis.import_optional("scipy.optimize", "calibrating")
    out = selfmis.open_run(config)
    if config.resume and (out / "results.json").exists():
        return add_comparisons(config, out, ranks)
    encoder, spec = open_input(config, ranks)
    records = labelled_records(config, spec, ranks)
    every_row = np.arange(len(records))
    split = split_by_fold(records, every_row, config, ranks)  # as the lists say
    for other in config.compare:
        check_comparable(other, records[split["test"]])
    last = selfmis.read_last(config, out, ranks)

    pairs = selfmis.read_pairs(config, records, every_row, spec, ranks)
    split = split_by_fold(records, pairs.usable, config, ranks)  # of what can be read
    extractor = FeatureExtractor(encoder.to(ranks.device), pairs, spec, ranks)
    warnings = test_set_warnings(encoder, records[split["test"]])
    if last is None:
        description = describe(config, records, split, extractor, warnings)
        selfmis.begin_run(out, config, description, ranks)
    else:
        started -= 60 * last["minutes"]  # of earlier starts

    if config.finetune:
        content, heads = finetune(config, extractor, split, out, last, started)
    else:
        content, heads = probe_frozen(config, extractor, split)
    ranks.barrier()  # the first process trains the heads alone
    if not ranks.is_main:
        return {}
    heads = better_head_first(heads, records.labels[split["val"]])
    results = evaluate(heads, records[split["test"]])
    results |= dict(config=vars(config), warnings=warnings)
    results["minutes"] = (time.time() - started) / 60
    results["reliability"] = save_detector(config, out, content, heads[0], records, split, warnings)
    write_results(config, out, heads, records, split, results, spec)
    compare(out, config.compare)
    return results


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


def open_input(config: ProbeConfig, ranks: Ranks) -> tuple[ResNet1D, InputSpec]:
    """The encoder to test, and how its input is made."""
    encoder = selfmis.open_encoder(config.encoder, config.size)
    encoders, lead_from = {}, {}
    if encoder is not None:
        encoders[config.encoder] = encoder
        # A 12-lead encoder may be asked for one lead, so its own ("all") is only the default.
        if encoder.leads == 1 or config.lead is None:
            lead_from = encoders
    spec = selfmis.resolve_input(config, encoders, lead_from)
    if encoder is None:
        leads = len(LEADS) if spec.lead == "all" else 1
        encoder = selfmis.random_encoder(leads, config.size)
    if encoder.leads == 1 and spec.lead == "all":
        raise UsageError(f"--lead all: {config.encoder} reads one lead")
    if encoder.leads > 1 and spec.lead != "all":
        text = f"it gets lead {spec.lead} and zeros for the other eleven"
        ranks.print(f"{config.encoder} reads twelve leads: {text}")
    return encoder, spec


def labelled_records(config: ProbeConfig, spec: InputSpec, ranks: Ranks) -> Records:
    """Those with a diagnostic statement; with --synthetic-only no real one trains."""
    records = selfmis.gather_records(config, spec.sample_rate_hz, SYNTHETIC_STREAM)
    listed = len(records)
    records = records[records.labels.any(1)]
    if len(records) == 0:
        raise UsageError(f"--data {' '.join(config.data)}: no labels; give PTB-XL or synthetic:N")
    if len(records) < listed:
        ranks.print(f"{listed - len(records):,} records without a diagnostic statement left out")
    if config.synthetic_only:
        trains = records.folds == selfmis.TRAINING_FOLD  # the synthetic ones beside real ones
        if trains.all() or not trains.any():
            raise UsageError("--synthetic-only: give both real and synthetic --data")
        records = records[trains | np.isin(records.folds, (config.val_fold, config.test_fold))]
    return records


def split_by_fold(
    records: Records, rows: np.ndarray, config: ProbeConfig, ranks: Ranks
) -> dict[str, np.ndarray]:
    """Of these rows, those that train, choose and test; no patient in two of the three.

    UsageError where a part is missing or fills no batch.
    """
    folds = records.folds[rows]
    is_val, is_test = folds == config.val_fold, folds == config.test_fold
    split = {"train": rows[~is_val & ~is_test], "val": rows[is_val], "test": rows[is_test]}
    patients = set()
    for name, part in split.items():
        if len(part) == 0:
            there = ", ".join(str(fold) for fold in np.unique(folds))
            flags = f"--val-fold {config.val_fold}, --test-fold {config.test_fold}"
            raise UsageError(f"no record in the {name} part ({flags}); there are folds {there}")
        these = set(records.patient_keys()[part].tolist())
        if patients & these:
            raise UsageError("a patient has records in two of the three parts; check strat_fold")
        patients |= these
    val_labels = records.labels[split["val"]]
    if not (val_labels.any(0) & ~val_labels.all(0)).any():
        raise UsageError(f"--val-fold {config.val_fold}: no statement has positives and negatives")
    if config.finetune:
        split["train"] = share_of(split["train"], config.fractions[0], config.seed)
        selfmis.epoch_batches(split["train"], config, 0, ranks)  # refuses what fills no batch
    return split


def share_of(rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A random share of the training records, as in Table 3: rare types may vanish.

    Smaller shares lie in larger ones.
    """
    if fraction == 1:
        return rows
    n = max(1, round(fraction * len(rows)))
    return np.sort(np.random.default_rng(seed).permutation(rows)[:n])


def test_set_warnings(encoder: ResNet1D, test: Records) -> list[str]:
    """Test records among the data that trained or chose the encoder or its teacher."""
    warnings = []
    for tested in selfmis.training_data(test, test[:0], labels=True):
        for entry in encoder.training_data:
            folds = set(tested["folds"]) & set(entry.get("folds") or range(1, 11))
            if entry["data"] == tested["data"] and folds:
                how = "chosen by" if entry["use"] == "validation" else "trained on"
                labels = "with" if entry["labels"] else "without"
                where = f"fold {', '.join(str(fold) for fold in sorted(folds))} of {entry['data']}"
                warnings.append(
                    f"the encoder or its teacher was {how} {where} {labels} labels; the test is "
                    "not clean"
                )
    return warnings


def describe(config, records, split, extractor, warnings) -> dict:
    """Say what is trained and tested on, so that wrong data shows; return it for config.json."""
    encoder, pairs, spec = extractor.encoder, extractor.pairs, extractor.spec
    counts = {name: len(rows) for name, rows in split.items()}
    usable = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    each = []
    for t in MI_TYPES:
        column = records.labels[:, STATEMENTS.index(t)]
        each.append(f"{t} " + "/".join(str(column[rows].sum()) for rows in split.values()))
    parameters = sum(p.numel() for p in encoder.parameters())
    doing = "fine-tuning" if config.finetune else "probing"
    processing = f"{spec.preprocessing['normalize']} (filter {spec.preprocessing['filter']})"
    extractor.ranks.print(
        f"{len(records):,} records with a diagnostic statement; usable: {usable}\n"
        f"positives (train/val/test): {'  '.join(each)}\n"
        f"{doing} an encoder of {parameters:,} parameters ({config.encoder}) on lead {spec.lead}, "
        f"{spec.sample_rate_hz:g} Hz, {processing}"
    )
    for warning in warnings:
        extractor.ranks.print(f"warning: {warning}")
    counts |= dict(unusable=selfmis.unusable_entry(pairs))
    world_size = extractor.ranks.world_size
    return dict(input=spec._asdict(), records=counts, warnings=warnings, world_size=world_size)


class FeatureExtractor:
    """Embeddings by one encoder; a 12-lead one asked for one lead gets zeros beside it."""

    def __init__(self, encoder: ResNet1D, pairs: Pairs, spec: InputSpec, ranks: Ranks) -> None:
        self.encoder = encoder
        self.pairs = pairs
        self.spec = spec
        self.ranks = ranks
        self.labels = torch.from_numpy(pairs.dataset.records.labels.astype(np.float32))  # (N, K)

    def batches(self, rows_of_batches: Sequence[np.ndarray]):
        """Signals (B, L, T) of each array of rows."""
        for signals, _ in self.pairs.batches(rows_of_batches):
            yield selfmis.with_empty_leads(signals, self.encoder, self.spec.lead)

    def features(self, rows: np.ndarray) -> torch.Tensor:
        """(N, D) float32 of these rows, in one pass that all processes share."""
        parts = [torch.empty(0, self.encoder.embedding_dim)]
        for signals in self.batches(self.ranks.share(rows)):
            parts.append(selfmis.embed(self.encoder, signals, self.ranks.device))
        return self.ranks.gather_rows(torch.cat(parts), len(rows))


# --------------------------------------------------------------------------------------------------
# Heads on frozen features
# --------------------------------------------------------------------------------------------------


def probe_frozen(
    config: ProbeConfig, extractor: FeatureExtractor, split: dict[str, np.ndarray]
) -> tuple[dict, list[TrainedHead]]:
    """The encoder's part of probe.pt, and its heads; with --baseline a random encoder's too."""
    encoder = extractor.encoder
    content = selfmis.encoder_content(encoder, extractor.spec, encoder.training_data)
    features = {"": {name: extractor.features(rows) for name, rows in split.items()}}
    if config.baseline:
        torch.manual_seed(config.seed)
        fresh = selfmis.random_encoder(encoder.leads, None, like=encoder)
        extractor.encoder = fresh.eval().to(extractor.ranks.device)  # some have dropout
        random = {name: extractor.features(rows) for name, rows in split.items()}
        features[BASELINE] = random
    heads = []
    if extractor.ranks.is_main:
        y = {name: extractor.labels[rows] for name, rows in split.items()}
        for encoder_label, x in features.items():
            heads += train_heads(config, x, y, encoder_label)
    return content, heads


def train_heads(config: ProbeConfig, x: dict, y: dict, encoder_label: str) -> list[TrainedHead]:
    """Every kind of head, share of labels and seed.  The test fold is scored and nothing else.

    x, y: features (N, D) and labels (N, K) of "train", "val" and "test".
    """
    heads = []
    for name, train_head in (("adam", adam_head), ("logistic", logistic_head)):
        if config.head not in (name, "both"):
            continue
        for fraction in sorted(set(config.fractions), reverse=True):
            for seed in range(config.seed, config.seed + config.seeds):
                if name == "logistic" and fraction == 1 and seed > config.seed:
                    continue  # it has one solution
                rows = share_of(np.arange(len(x["train"])), fraction, seed)
                train = x["train"][rows], y["train"][rows]
                weight, bias, text = train_head(*train, x["val"], y["val"], config, seed)
                val_logits = score(x["val"], weight, bias)
                test_logits = score(x["test"], weight, bias)
                head = TrainedHead(
                    name + encoder_label, seed, fraction, weight, bias, val_logits, test_logits
                )
                heads.append(head)
                six = group_means(selfmis.macro_auc(y["val"], val_logits)[1])["six"]
                line = f"{head.name}, seed {seed}, {len(rows):,} labels: {text}; six {six:.4f}"
                print(line, flush=True)
    return heads


def score(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> np.ndarray:
    """Logits (N, K) of a head."""
    return features.numpy() @ weight.numpy().T + bias.numpy()


def adam_head(x, y, x_val, y_val, config: ProbeConfig, seed: int):
    """Table 8: Adam, cosine, early stopping.  (N, D), (N, K) -> weight (K, D), bias (K,), a text.

    Features are divided by one number, since a cosine loss leaves their scale open.
    """
    scale = x.square().mean().sqrt().clamp_min(1e-12)
    x, x_val = x / scale, x_val / scale
    generator = torch.Generator().manual_seed(seed)
    bound = x.shape[1] ** -0.5
    weight = 2 * bound * torch.rand(y.shape[1], x.shape[1], generator=generator) - bound
    weight.requires_grad_()
    bias = torch.zeros(y.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
    steps = config.epochs * math.ceil(len(x) / config.batch_size)
    step = 0
    best_auc, best_epoch, best_head = -math.inf, 0, None
    for epoch in range(config.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(config.batch_size):
            optimizer.param_groups[0]["lr"] = selfmis.cosine_lr(config.lr, step, steps)
            logits = F.linear(x[rows], weight, bias)
            loss = F.binary_cross_entropy_with_logits(logits, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        with torch.no_grad():
            auc, _ = selfmis.macro_auc(y_val, F.linear(x_val, weight, bias))
        if auc > best_auc:
            best_auc, best_epoch = auc, epoch
            best_head = weight.detach() / scale, bias.detach().clone()
        elif epoch - best_epoch >= config.patience:
            break
    text = f"best epoch {best_epoch + 1} of {config.epochs}, validation AUC {best_auc:.4f}"
    return *best_head, text


def logistic_head(x, y, x_val, y_val, config: ProbeConfig, seed: int):
    """Logistic regression with an L2 penalty on standardised features, solved to convergence.

    Its strength is the one of STRENGTHS with the best validation AUC; the search goes from strong
    to weak in float32 and ends when two are worse than one before; the chosen one is solved again
    in float64.  Shapes as in adam_head.
    """
    mean, deviation = x.double().mean(0), x.double().std(0)
    deviation[~(deviation > 0)] = 1  # a constant feature, or a single record
    z, z_val = (x - mean) / deviation, (x_val - mean) / deviation  # (N, D) float64
    # In their principal axes the Hessian is nearly diagonal; turning does not change the penalty.
    variance, axes = torch.linalg.eigh(z.T @ z / len(z))
    z, z_val = F.pad(z @ axes, (0, 1), value=1), F.pad(z_val @ axes, (0, 1), value=1)  # (N, D + 1)
    variance = F.pad(variance.clamp_min(0), (0, 1), value=1)  # (D + 1,)
    share = y.double().mean(0).clamp(1 / (2 * len(y)), 1 - 1 / (2 * len(y)))  # (K,)
    weight = torch.zeros(z.shape[1], y.shape[1], dtype=torch.float64)  # (D + 1, K)
    weight[-1] = torch.logit(share)
    curvature = variance[:, None] * share * (1 - share)  # (D + 1, K)
    best_auc, best_strength, best_weight, worse = -math.inf, 0.0, weight, 0
    for strength in STRENGTHS:
        weight = solve_logistic(z.float(), y, weight, curvature, strength, 1e-5)
        auc, _ = selfmis.macro_auc(y_val, z_val @ weight)
        if auc > best_auc:
            best_auc, best_strength, best_weight, worse = auc, strength, weight, 0
        else:
            worse += 1
        if worse == 2:
            break
    weight = solve_logistic(z, y, best_weight, curvature, best_strength, 1e-6)
    head = (axes @ weight[:-1]).T / deviation  # (K, D)
    bias = weight[-1] - head @ mean
    text = f"L2 strength {best_strength:.3g}, validation AUC {best_auc:.4f}"
    return head.float(), bias.float(), text


def solve_logistic(z, y, weight, curvature, strength: float, tolerance: float) -> torch.Tensor:
    """weight (D + 1, K) of the least mean logistic loss + strength / 2 |weight|^2, class by class.

    The last row (the bias) is free of penalty.  The loss is a sum over classes, so one L-BFGS
    solves all, in coordinates in which the curvature is about 1 everywhere; it ends where no
    gradient there exceeds `tolerance`.
    """
    penalty = torch.full((len(weight), 1), strength, dtype=z.dtype)
    penalty[-1] = 0
    y = y.to(z.dtype)
    unit = (curvature.to(z.dtype) + penalty).rsqrt()  # (D + 1, K)
    scaled = (weight.to(z.dtype) / unit).requires_grad_()
    solver = torch.optim.LBFGS(
        [scaled],
        max_iter=500,
        tolerance_grad=tolerance,
        tolerance_change=torch.finfo(z.dtype).eps,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        weight = scaled * unit
        loss = F.binary_cross_entropy_with_logits(z @ weight, y, reduction="sum") / len(z)
        loss = loss + (penalty * weight.square()).sum() / 2
        loss.backward()
        return loss

    solver.step(objective)
    return (scaled.detach() * unit).double()


# --------------------------------------------------------------------------------------------------
# Training the encoder too
# --------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """An encoder with one logit a statement: (B, L, T) -> (B, K)."""

    def __init__(self, encoder: ResNet1D) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embedding_dim, len(STATEMENTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


@dataclasses.dataclass
class Finetuning:
    """What one run holds while it trains encoder and head."""

    config: ProbeConfig
    extractor: FeatureExtractor
    split: dict[str, np.ndarray]
    out: Path
    model: Classifier
    learner: Learner
    training_data: list[dict]
    started: float  # as if all starts of this run had been one
    epoch: int = 0  # finished epochs
    best: float = -math.inf  # validation AUC
    best_epoch: int = 0


def finetune(
    config: ProbeConfig,
    extractor: FeatureExtractor,
    split: dict[str, np.ndarray],
    out: Path,
    last: dict | None,
    started: float,
) -> tuple[dict, list[TrainedHead]]:
    """Supervised training of encoder and head: Table 8's recipe, Table 7's clipping.

    best.pt is the epoch of the best validation AUC; returns its content and its head.
    """
    ranks, encoder = extractor.ranks, extractor.encoder
    records = extractor.pairs.dataset.records
    seen = selfmis.training_data(records[split["train"]], records[split["val"]], labels=True)
    seen = encoder.training_data + seen
    model = Classifier(encoder).to(ranks.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
    learner = Learner(model, optimizer, config, ranks)
    run = Finetuning(config, extractor, split, out, model, learner, seen, started)
    if last is None:
        save_last(run)
    else:
        learner.restore(last, split["train"], split["val"])
        run.epoch, run.best, run.best_epoch = last["epoch"], last["best"], last["best_epoch"]
        ranks.print(f"{out}: going on at epoch {run.epoch + 1}")
    while run.epoch < config.epochs and run.epoch - run.best_epoch < config.patience:
        entry = train_one_epoch(run)
        auc = validate(run)
        finish_epoch(run, entry, auc)
    ranks.barrier()
    best = selfmis.read_checkpoint(out / "best.pt")  # every process scores its share with it
    encoder.load_state_dict(best["encoder"])
    weight, bias = best["head"]
    val_logits = score(extractor.features(split["val"]), weight, bias)
    test_logits = score(extractor.features(split["test"]), weight, bias)
    fraction = config.fractions[0]
    head = TrainedHead("finetune", config.seed, fraction, weight, bias, val_logits, test_logits)
    return best, [head]


def train_one_epoch(run: Finetuning) -> dict:
    """Binary cross-entropy over all 44 statements; the epoch's loss and speed for log.jsonl."""
    config, extractor = run.config, run.extractor
    ranks = extractor.ranks
    started = time.time()
    batches = selfmis.epoch_batches(run.split["train"], config, run.epoch, ranks)
    steps = len(batches)
    losses = []
    for step, (rows, signals) in enumerate(zip(batches, extractor.batches(batches), strict=True)):
        lr = selfmis.cosine_lr(config.lr, run.epoch * steps + step, config.epochs * steps)
        run.learner.optimizer.param_groups[0]["lr"] = lr
        logits = run.learner.forward(signals).float()  # (B, K)
        target = extractor.pairs.on_device(extractor.labels[rows].numpy())  # (B, K)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        run.learner.update(loss)
        losses.append(loss.detach())
    loss = float(np.mean(ranks.gather_objects(float(torch.stack(losses).mean()))))
    if not math.isfinite(loss):
        raise UsageError(
            f"the loss is {loss} in epoch {run.epoch + 1}; last.pt is from before: start again "
            "with --overwrite and a lower --lr or --amp off"
        )
    records = steps * config.batch_size * ranks.world_size
    return dict(train_loss=loss, records_per_second=records / (time.time() - started))


@torch.no_grad()
def validate(run: Finetuning) -> float:
    """AUC over all 44 statements on the validation fold, the same on every process."""
    rows = run.split["val"]
    ranks = run.extractor.ranks
    features = run.extractor.features(rows).to(ranks.device)
    auc, _ = selfmis.macro_auc(run.extractor.labels[rows], run.model.head(features))
    return ranks.gather_objects(auc)[0]  # other cards may round otherwise


def finish_epoch(run: Finetuning, entry: dict, auc: float) -> None:
    """Count the epoch, keep the network if it is the best, and say so."""
    run.epoch += 1
    is_best = auc > run.best
    if is_best:
        run.best, run.best_epoch = auc, run.epoch
    if not run.extractor.ranks.is_main:
        return
    selfmis.append_log(run.out, dict(epoch=run.epoch, val_macro_auc=auc) | entry)
    if is_best:
        selfmis.save(run.out / "best.pt", network(run) | dict(metrics=dict(val_macro_auc=auc)))
    save_last(run)
    text = f"train loss {entry['train_loss']:.4f} | validation AUC {auc:.4f}"
    rate = f"{entry['records_per_second']:,.0f} ECG/s"
    print(f"epoch {run.epoch}/{run.config.epochs} | {text} | {rate}", flush=True)


def network(run: Finetuning) -> dict:
    """Encoder and head as checkpoints hold them."""
    layer = run.model.head
    head = layer.weight.detach().cpu(), layer.bias.detach().cpu()
    content = selfmis.encoder_content(run.model.encoder, run.extractor.spec, run.training_data)
    content |= dict(kind="finetune", head=head, classes=list(STATEMENTS), config=vars(run.config))
    return content | selfmis.environment()


def save_last(run: Finetuning) -> None:
    """Everything that --resume needs; the order of records is a function of (seed, epoch)."""
    if not run.extractor.ranks.is_main:
        return
    content = network(run) | run.learner.state(run.split["train"], run.split["val"])
    content |= dict(epoch=run.epoch, best=run.best, best_epoch=run.best_epoch)
    content |= dict(minutes=(time.time() - run.started) / 60)
    content |= dict(world_size=run.extractor.ranks.world_size)
    selfmis.save(run.out / "last.pt", content)


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------


def at_full_labels(heads: list[TrainedHead]) -> list[TrainedHead]:
    """Those with the largest share of the labels, which the results are about."""
    most = max(head.fraction for head in heads)
    return [head for head in heads if head.fraction == most]


def contenders(heads: list[TrainedHead]) -> list[TrainedHead]:
    """Those among which the validation fold chooses: not the baseline's."""
    return [head for head in at_full_labels(heads) if not head.name.endswith(BASELINE)]


def better_head_first(heads: list[TrainedHead], y_val: np.ndarray) -> list[TrainedHead]:
    """The head with the best validation AUC first: it detects, and the table begins with it."""
    own = contenders(heads)
    aucs = [selfmis.macro_auc(y_val, head.val_logits)[0] for head in own]
    best = own[int(np.argmax(aucs))]
    same = [head for head in heads if head.name == best.name and head is not best]
    others = [head for head in heads if head.name != best.name]
    return [best, *same, *others]


def evaluate(heads: list[TrainedHead], test: Records) -> dict:
    """results.json without its settings; intervals are bootstrap percentiles by patient."""
    y, patients = test.labels, test.patient_keys()
    runs = []
    for head in heads:
        auc = selfmis.macro_auc(y, head.test_logits)[1]
        types = {t: float(auc[STATEMENTS.index(t)]) for t in MI_TYPES}
        run = dict(seed=head.seed, fraction=head.fraction, head=head.name, types=types)
        runs.append(run | group_means(auc))
    summaries = {}
    for name in dict.fromkeys(head.name for head in heads):
        logits = [head.test_logits for head in at_full_labels(heads) if head.name == name]
        auc, draws = mean_auc(logits, y, patients)
        scores = [infarct_score(one) for one in logits]
        summaries[name] = summarize(auc, draws, y) | dict(any=any_infarct(scores, y, patients))
    return summaries[heads[0].name] | dict(heads=summaries, runs=runs)


def columns(group: str) -> list[int]:
    return [STATEMENTS.index(statement) for statement in GROUPS[group]]


def group_means(auc: np.ndarray) -> dict[str, float]:
    """AUC (K,) -> the mean of each group over the statements that are there."""
    means = {}
    for group in GROUPS:
        present = auc[columns(group)]
        present = present[np.isfinite(present)]
        means[group] = float(present.mean()) if len(present) else math.nan
    return means


def mean_auc(logits: list, y: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds of the AUC (K,) and of its bootstrap draws (R, K)."""
    auc = [selfmis.macro_auc(y, one)[1] for one in logits]
    draws = [selfmis.bootstrap_auc(y, one, patients) for one in logits]
    return np.mean(auc, 0), np.mean(draws, 0)


def interval_entry(draws: np.ndarray, y: np.ndarray) -> dict:
    """Interval of draws (R,) and positives of labels (N,); no interval where one class is rare."""
    low, high = selfmis.interval(draws)
    positives = int(y.sum())
    if min(positives, len(y) - positives) < MINIMUM_POSITIVES:
        low, high = math.nan, math.nan
    return dict(low=low, high=high, positives=positives)


def summarize(auc: np.ndarray, draws: np.ndarray, y: np.ndarray) -> dict:
    """auc (K,), its draws (R, K), labels (N, K) -> types and means, absent classes left out.

    No interval for a type with fewer than ten positives, nor for a mean over six or nine that
    rests on it.
    """
    summary = {"types": {}}
    for t in MI_TYPES:
        k = STATEMENTS.index(t)
        entry = interval_entry(draws[:, k], y[:, k])
        summary["types"][t] = dict(auc=float(auc[k])) | entry
    for group in GROUPS:
        present = [k for k in columns(group) if np.isfinite(auc[k])]
        low, high, mean = math.nan, math.nan, math.nan
        if present:
            mean = float(auc[present].mean())
            low, high = selfmis.interval(draws[:, present].mean(1))
        # One rare class in 44 does little to their mean, one in six or nine a lot.
        rarest = min((int(y[:, k].sum()) for k in present), default=0)
        if group != "diagnostic" and rarest < MINIMUM_POSITIVES:
            low, high = math.nan, math.nan
        summary[group] = dict(mean=mean, low=low, high=high, classes=len(present))
    return summary


def infarct_score(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(N, 44) -> (N,) s by which any infarct is ranked; 1 - exp(-s) = 1 - prod(1 - p) of nine."""
    logits = logits[:, NINE].astype(np.float64) / temperature
    return np.logaddexp(0, logits).sum(1)  # log(1 + e^logit) = -log(1 - p)


def any_infarct(scores: list, y: np.ndarray, patients: np.ndarray) -> dict[str, dict]:
    """AUC of scores (N,), a run each, against all records without an infarct and the normal ones.

    y (N, 44), patients (N,).
    """
    infarct = y[:, NINE].any(1)
    found = {}
    everybody = np.ones_like(infarct)
    for other, rows in (("others", everybody), ("NORM", infarct | (y[:, NORM] > 0))):
        one_column = [score[rows, None] for score in scores]  # (N, 1) each
        auc, draws = mean_auc(one_column, infarct[rows, None], patients[rows])
        entry = interval_entry(draws[:, 0], infarct[rows])
        negatives = int((~infarct[rows]).sum())
        found[other] = dict(auc=float(auc[0]), negatives=negatives) | entry
    return found


def fit_temperature(logits: np.ndarray, y: np.ndarray) -> float:
    """T for which sigmoid(logit / T) has the least logistic loss over all statements (N, K).

    A temperature for each statement, or a shift, fits a fold's few positives and was worse on the
    fold's other half.
    """
    optimize = selfmis.import_optional("scipy.optimize", "calibrating")
    logits = torch.from_numpy(logits).double()
    target = torch.from_numpy(y).double()

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        return float(F.binary_cross_entropy_with_logits(scaled, target))

    return math.exp(optimize.minimize_scalar(loss, bounds=(-7, 7), method="bounded").x)


def detector_content(head: TrainedHead, y_val: np.ndarray) -> dict:
    """What extras/detect.py reads of probe.pt beside the encoder; y_val (N, K).

    The validation fold's scores are kept: a threshold is chosen from them when somebody asks.
    """
    temperature = fit_temperature(head.val_logits, y_val)
    infarct = y_val[:, NINE].any(1)
    p = -np.expm1(-infarct_score(head.val_logits, temperature))  # (N,)
    validation = dict(
        any_infarct=torch.from_numpy(p).float(),
        infarct=torch.from_numpy(infarct),
        normal=torch.from_numpy((y_val[:, NORM] > 0) & ~infarct),
    )
    content = dict(head=(head.weight, head.bias), head_name=head.name, classes=list(STATEMENTS))
    positives = torch.from_numpy(y_val.sum(0, dtype=np.int64))
    return content | dict(temperature=temperature, validation=validation, positives=positives)


def reliability(logits: np.ndarray, y: np.ndarray, temperature: float) -> dict[str, float]:
    """Of the nine types on the test fold: Brier score, expected calibration error over ten bins."""
    p = 1 / (1 + np.exp(-logits[:, NINE].astype(np.float64) / temperature))  # (N, 9)
    hits = y[:, NINE]
    errors = []
    for k in range(len(NINE)):
        for rows in np.array_split(np.argsort(p[:, k], kind="stable"), 10):  # of equal size
            if len(rows):
                gap = abs(p[rows, k].mean() - hits[rows, k].mean())
                errors.append(gap * len(rows) / len(p) / len(NINE))
    brier = float(np.square(p - hits).mean())
    return dict(temperature=temperature, ece=float(np.sum(errors)), brier=brier)


def save_detector(config, out, content, head, records, split, warnings) -> dict:
    """probe.pt: encoder, head, calibration and what is known of them; returns its reliability."""
    train = split["train"]
    if not config.finetune:
        train = share_of(train, head.fraction, head.seed)
    seen = selfmis.training_data(records[train], records[split["val"]], labels=True)
    detector = detector_content(head, records.labels[split["val"]])
    temperature = detector["temperature"]
    calibration = reliability(head.test_logits, records.labels[split["test"]], temperature)
    # Of this head alone: the table shows means over seeds.
    own = evaluate([head], records[split["test"]])
    kept = {name: own[name] for name in (*GROUPS, "types", "any")}
    content = content | detector | selfmis.environment()
    content |= dict(kind="probe", config=vars(config), head_training_data=seen, warnings=warnings)
    content |= dict(results=selfmis.nan_to_none(kept), reliability=calibration)
    selfmis.save(out / "probe.pt", content)
    return calibration


def write_results(config, out, heads, records, split, results, spec) -> None:
    """predictions.npz, roc.png, results.md, and last results.json: it marks a finished run."""
    test = records[split["test"]]
    save_predictions(out / "predictions.npz", heads, records, split)
    draw_roc(out / "roc.png", heads[0], test.labels)
    table = as_table(results["heads"], results["types"])
    if len(set(config.fractions)) > 1:
        table += f"\n\nby share of the training labels, {config.seeds} seed(s)\n"
        table += as_fractions(results)
    patients = len(np.unique(test.patient_keys()))
    share = max(config.fractions)
    labels = "" if share == 1 else f", with {share:g} of the labels"
    title = (
        f"{config.encoder} on lead {spec.lead}{labels}: AUC on fold {config.test_fold}, "
        f"{len(test):,} records of {patients:,} patients; in brackets the 95 % bootstrap interval "
        f"by patient, where there are {MINIMUM_POSITIVES} positives (fewer would make it falsely "
        "narrow)"
    )
    text = f"{title}\n\n{table}\n"
    for warning in results["warnings"]:
        text += f"\nwarning: {warning}\n"
    selfmis.write_atomically(out / "results.md", text.encode())
    selfmis.write_json(out / "results.json", results)
    print(f"\n{title}\n{table}")
    if len(contenders(heads)) > 1:
        chosen = f"{heads[0].name} head of seed {heads[0].seed}"
        print(f"probe.pt holds the {chosen}, the best one on the validation fold")
    print(f"{results['minutes']:.1f} min; written to {out}", flush=True)


def save_predictions(path: Path, heads, records: Records, split: dict) -> None:
    """Logits (seeds, N, 44) of each head, test and validation fold, with labels and names.

    The first of the first head stands as `logits` too.
    """
    test, val = records[split["test"]], records[split["val"]]
    arrays = dict(labels=test.labels, fold=test.folds, patient=test.patient_keys())
    arrays["record"] = np.array([test.name(i) for i in range(len(test))])
    arrays |= dict(validation_labels=val.labels, validation_patient=val.patient_keys())
    arrays["logits"] = heads[0].test_logits
    for name in dict.fromkeys(head.name for head in heads):
        same = [head for head in at_full_labels(heads) if head.name == name]
        key = name.replace(BASELINE, BASELINE_KEY)
        arrays[f"logits_{key}"] = np.stack([head.test_logits for head in same])
        arrays[f"validation_logits_{key}"] = np.stack([head.val_logits for head in same])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    selfmis.write_atomically(path, buffer.getvalue())


def read_predictions(folder: str | Path) -> tuple[dict, dict]:
    """(labels, fold and patient of the test records, {head: logits (seeds, N, K)}) of a run."""
    try:
        with np.load(Path(folder) / "predictions.npz") as saved:
            arrays = dict(saved)
        test = {name: arrays[name] for name in ("labels", "fold", "patient")}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{folder}: no readable predictions.npz in it; give a finished run's folder"
        ) from error
    logits = {}
    for name, value in arrays.items():
        if name.startswith("logits_"):
            if value.shape[1:] != test["labels"].shape or not np.isfinite(value).all():
                raise UsageError(f"{folder}: {name} of its predictions.npz is damaged")
            logits[name.removeprefix("logits_")] = value
    if not logits:
        raise UsageError(f"{folder}: no logits in its predictions.npz")
    return test, logits


def check_comparable(folder: str, test: Records) -> None:
    """UsageError unless another run was tested on (nearly) these records.

    Unusable ones may be missing there; `compare` looks at every one when they are known.
    """
    theirs, _ = read_predictions(folder)
    if len(theirs["fold"]) > len(test) or set(theirs["patient"]) - set(test.patient_keys()):
        raise UsageError(
            f"--compare {folder}: it was tested on other records; both need the same --data, "
            "--test-fold and --limit"
        )


def compare(out: Path, others: list[str]) -> None:
    """This finished run minus others, head by head; into results.json and results.md."""
    if not others:
        return
    test, logits = read_predictions(out)
    results = json.loads((out / "results.json").read_text())
    compared = results.setdefault("compared", {})
    for other in others:
        their_test, their_logits = read_predictions(other)
        if not all(np.array_equal(test[name], their_test[name]) for name in test):
            raise UsageError(f"--compare {other}: it was tested on other records")
        compared[other] = {}
        for mine, theirs in comparable_heads(logits, their_logits):
            auc, draws = mean_auc(logits[mine], test["labels"], test["patient"])
            their_auc, their_draws = mean_auc(their_logits[theirs], test["labels"], test["patient"])
            difference = summarize(auc - their_auc, draws - their_draws, test["labels"])
            compared[other][f"{mine} - {theirs}"] = difference
    text = (out / "results.md").read_text().split("\nthis run minus ")[0]
    for other, differences in compared.items():
        table = as_table(differences, results["types"], "{:+.3f}")
        text += f"\nthis run minus {other}: AUC with its 95 % interval, paired by patient\n"
        text += f"{table}\n"
    print(text[text.index("\nthis run minus ") :], flush=True)
    selfmis.write_atomically(out / "results.md", text.encode())
    selfmis.write_json(out / "results.json", results)


def comparable_heads(own: dict, theirs: dict) -> list[tuple[str, str]]:
    """Heads of the same name; where there are none, each with each but the baseline's."""
    same = [(name, name) for name in own if name in theirs]
    if same:
        return same
    own = [name for name in own if not name.endswith(BASELINE_KEY)]
    theirs = [name for name in theirs if not name.endswith(BASELINE_KEY)]
    return [(mine, name) for mine in own for name in theirs]


def add_comparisons(config: ProbeConfig, out: Path, ranks: Ranks) -> dict:
    """--resume of a finished run: nothing is trained again, --compare is added."""
    try:
        results = json.loads((out / "results.json").read_text())
    except ValueError as error:
        raise UsageError(f"{out / 'results.json'}: damaged; --overwrite starts anew") from error
    ranks.print(f"{out}: finished already, see {out / 'results.md'}")
    if ranks.is_main:
        compare(out, config.compare)
    return results


def format_cell(entry: dict, key: str, form: str) -> str:
    """'0.781 (0.752 to 0.808)', without an interval '0.781', 'absent' where there is no number."""
    value, low, high = entry[key], entry["low"], entry["high"]
    if value is None or math.isnan(value):
        return "absent"
    text = form.format(value)
    if low is None or math.isnan(low):
        return text
    return f"{text} ({form.format(low)} to {form.format(high)})"


def as_table(heads: dict, types: dict, form: str = "{:.3f}") -> str:
    """Markdown: the nine types, their means and all infarcts as one, a column for each head."""
    lines = [["", "positives", *heads]]
    for t in MI_TYPES:
        cells = [format_cell(summary["types"][t], "auc", form) for summary in heads.values()]
        lines.append([t, types[t]["positives"], *cells])
    for group, name in GROUP_NAMES.items():
        summaries = [summary[group] for summary in heads.values()]
        missing = len(GROUPS[group]) - summaries[0]["classes"]
        if missing:
            name += f" ({missing} absent)"
        total = ""
        if group != "diagnostic":
            total = sum(types[t]["positives"] for t in GROUPS[group])
        lines.append([name, total, *[format_cell(entry, "mean", form) for entry in summaries]])
    for other in next(iter(heads.values())).get("any", ()):
        entries = [summary["any"][other] for summary in heads.values()]
        cells = [format_cell(entry, "auc", form) for entry in entries]
        lines.append([f"any MI vs. {other}", entries[0]["positives"], *cells])
    return as_markdown(lines)


def as_fractions(results: dict) -> str:
    """Table 3: mean and deviation over seeds, a column for each head and share of the labels."""
    cells = {}
    for run in results["runs"]:
        name = f"{run['head']}, {100 * run['fraction']:g} %"
        groups = {GROUP_NAMES[group]: run[group] for group in GROUPS}
        cells.setdefault(name, []).append(run["types"] | groups)
    lines = [["", "positives", *cells]]
    for row in (*MI_TYPES, *GROUP_NAMES.values()):
        texts = []
        for runs in cells.values():
            values = [run[row] for run in runs]
            text = "absent" if math.isnan(values[0]) else f"{np.mean(values):.3f}"
            if len(values) > 1 and text != "absent":
                text += f" ± {np.std(values, ddof=1):.3f}"
            texts.append(text)
        positives = results["types"][row]["positives"] if row in results["types"] else ""
        lines.append([row, positives, *texts])
    return as_markdown(lines)


def as_markdown(lines: list[list]) -> str:
    """A table whose first two columns are names and numbers, padded so that it reads as text."""
    widths = [max(len(str(line[k])) for line in lines) for k in range(len(lines[0]))]
    rows = []
    for line in lines:
        cells = [f"{str(cell):<{width}}" for cell, width in zip(line, widths, strict=True)]
        rows.append(f"| {' | '.join(cells)} |")
    rows.insert(1, "|---|--:|" + "---|" * (len(widths) - 2))
    return "\n".join(rows)


def draw_roc(path: Path, head: TrainedHead, y: np.ndarray) -> None:
    """ROC curves of the types that have enough positives."""
    figure_class = selfmis.import_optional("matplotlib.figure", "drawing roc.png").Figure
    figure = figure_class(figsize=(5.5, 5.5))
    axes = figure.add_subplot(
        title=f"{head.name} head, seed {head.seed}", xlabel="1 - specificity", ylabel="sensitivity"
    )
    axes.set(box_aspect=1, xlim=(0, 1), ylim=(0, 1.005))
    axes.plot([0, 1], [0, 1], color="0.8", lw=0.8)
    for t in MI_TYPES:
        k = STATEMENTS.index(t)
        positives = int(y[:, k].sum())
        if positives in (0, len(y)):
            continue
        auc = selfmis.roc_auc(y[:, k], head.test_logits[:, k])
        order = np.argsort(-head.test_logits[:, k], kind="stable")
        ranked, hits = head.test_logits[order, k], y[order, k]
        run_ends = np.append(ranked[1:] != ranked[:-1], True)  # equal scores pass together
        sensitivity = np.append(0, np.cumsum(hits)[run_ends]) / positives
        false_alarms = np.append(0, np.cumsum(1 - hits)[run_ends]) / (len(y) - positives)
        style = "-" if positives >= MINIMUM_POSITIVES else ":"
        axes.plot(false_alarms, sensitivity, style, label=f"{t} {auc:.3f} (n = {positives})")
    title = f"AUC; dotted: fewer than {MINIMUM_POSITIVES} positives"
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title=title, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    selfmis.write_atomically(path, buffer.getvalue())


if __name__ == "__main__":
    selfmis.run_script(main, ProbeConfig, __doc__)
