"""How well an encoder's embedding of lead I tells nine types of infarction apart (paper, sections 3.2 and 3.3, Table 8).

    python train_probe.py --encoder runs/pretrain/best.pt                                # no data: synthetic ECG
    python train_probe.py --data ptb-xl --encoder runs/a/best.pt --out runs/a-probe      # linear heads on the frozen encoder
    python train_probe.py --data ptb-xl --finetune --lead all --out runs/teacher         # a supervised 12-lead network

Trains on all folds but two, chooses on the validation fold, and touches the test fold once, at the end.  Writes
OUT/probe.pt (not with --rotate), results.json, results.md, roc.png, predictions.npz and config.json; with --finetune best.pt, last.pt
and log.jsonl too.
--fractions 0.25 0.5 1 --seeds 5 is Table 3; --rotate tests on every fold in turn; --compare RUN sets this run beside another.
"""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import selfmis
from selfmis import LEADS, MI_TYPES, SIX_TYPES, STATEMENTS, Config, Pairs, Ranks, Records, ResNet1D, flag


@dataclasses.dataclass
class ProbeConfig(Config):
    """Flags of train_probe.py."""

    out: str = flag("runs/probe", "folder of the run", metavar="DIR")
    batch_size: int = flag(64, "records in a batch of one process", type=int)
    lr: float = flag(5e-4, "peak learning rate, cosine to 0", type=float)
    encoder: str = flag("random", "the encoder to test: an ECGFounder file, a checkpoint of ours, or random", metavar="PATH|random")
    finetune: bool = flag(False, "train the encoder together with its head")
    head: str = flag("both", "adam: the paper's; logistic: L2, solved to convergence, its strength chosen on the validation fold", choices=("adam", "logistic", "both"))
    seeds: int = flag(1, "train the heads this often, from seed, seed + 1, ...", type=int)
    fractions: list[float] = flag([1.0], "shares of the training records whose labels are used, drawn at random for each seed (default: 1)", type=float, nargs="+", metavar="F")
    synthetic_only: bool = flag(False, "train on the synthetic records of --data alone; the real ones choose and test")
    rotate: bool = flag(False, "let every fold be the test fold once; for encoders that never saw labels of these data")
    compare: list[str] = flag([], "folder of another run on the same test records: difference and its paired interval; repeatable", action="append", type=str, metavar="RUN")
    baseline: bool = flag(False, "probe a random encoder of the same size too, beside this one")
    patience: int = flag(5, "epochs without a better validation macro AUC before training stops", type=int)


# Without data: as in train_pretrain.py, whose best.pt fits.
DEMO = dict(data=["synthetic:3000"], size="small", sample_rate=100, baseline=True)
SYNTHETIC_STREAM = 2  # seed of the synthetic records here; train_pretrain.py draws others
STRENGTHS = tuple(10.0 ** (2 - k / 2) for k in range(13))  # of the L2 penalty, from strong to weak
GROUPS = {"nine": MI_TYPES, "six": SIX_TYPES, "diagnostic": STATEMENTS}  # of statements; each gets a mean
NAMES = {"nine": "nine-type mean", "six": "six-type mean", "diagnostic": f"all {len(STATEMENTS)} statements"}


def main(config: ProbeConfig) -> dict:
    """Probe or fine-tune; returns the content of results.json (in the first process)."""
    started = time.time()
    ranks = selfmis.join_ranks(config.device, config.seed)
    if not config.data:
        own = {"size", "sample_rate"} if config.encoder != "random" else set()  # an encoder that has a size and a rate
        own |= {"baseline"} if config.finetune else set()
        config = selfmis.demo_settings(config, {k: v for k, v in DEMO.items() if k not in own}, ranks)
    check_flags(config)
    encoder = selfmis.open_encoder(config.encoder, 0, config.size)
    # A 12-lead encoder may be asked for one lead, so its own lead ("all") is only the default.
    lead_of = {config.encoder: encoder} if encoder is not None and not (encoder.leads == 12 and config.lead) else {}
    view = selfmis.resolve_view(config, lead_of, {config.encoder: encoder} if encoder is not None else {})
    if encoder is None:
        encoder = ResNet1D(len(LEADS) if view.lead == "all" else 1, **selfmis.SIZES[config.size or "ecgfounder"])
    if encoder.leads == 1 and view.lead == "all":
        raise ValueError(f"--lead all: {config.encoder} reads one lead")
    encoder.to(ranks.device)
    if encoder.leads > 1 and view.lead != "all":
        ranks.print(f"{config.encoder} reads twelve leads: it gets lead {view.lead} and zeros for the other eleven")

    records = selfmis.gather_records(config, view.sample_rate_hz, SYNTHETIC_STREAM)
    if records.labels is None:
        raise ValueError(f"--data {' '.join(config.data)}: probing needs labels; give PTB-XL or synthetic:N")
    unlabelled = ~records.labels.any(1)
    records = records[~unlabelled]
    if config.synthetic_only:
        synthetic = np.array([kind == "synthetic" for kind, _ in records.sources])[records.source]
        records = records[synthetic | np.isin(records.folds, (config.val_fold, config.test_fold))]
    out = selfmis.open_run(config, ranks)
    if config.resume and (out / "results.json").exists():
        results = json.loads((out / "results.json").read_text())
        now = json.loads(json.dumps(dataclasses.asdict(config)))
        if any(now[name] != results["config"][name] for name in now if name in results["config"] and name not in selfmis.FREE_ON_RESUME):
            raise ValueError(f"--resume: {out} holds the results of other settings, see its config.json; give another --out, or --overwrite")
        ranks.print(f"{out}: finished already, see {out / 'results.md'}")
        if ranks.first:
            compare(out, config.compare)
        return results
    pairs = selfmis.read_pairs(config, records, view, ranks, "records")
    splits = split_by_fold(records, pairs.usable, config)
    split, test = splits[0], np.concatenate([split["test"] for split in splits])
    if config.finetune:
        split["train"] = part_of(split["train"], config.fractions[0], config.seed)
    describe(config, records, split, int(unlabelled.sum()), view, encoder, ranks)
    warn_if_seen(encoder.seen, records, test, config, ranks)
    for other in config.compare:
        read_predictions(Path(other), records.labels[test], records.folds[test], records.patients[test])
    if ranks.first:
        counts = {name: len(rows) for name, rows in split.items()} | dict(tested=len(test), unlabelled=int(unlabelled.sum()), unusable=pairs.unusable)
        said = dict(config=dataclasses.asdict(config), view=view._asdict(), records=counts, world=ranks.world)
        selfmis.write_json(out / "config.json", said | selfmis.environment())

    y = records.labels.astype(np.float32)
    shown = Shown(encoder, pairs, view, ranks)
    content, heads, earlier = finetune(config, shown, y, split, out, ranks) if config.finetune else (*probe_frozen(config, shown, y, splits, ranks), 0)
    ranks.barrier()
    if not ranks.first:
        return {}

    results = evaluate(heads, records.labels[test], records.folds[test], records.patient_keys()[test])
    results |= dict(config=dataclasses.asdict(config), cost=shown.cost(), minutes=earlier + (time.time() - started) / 60)
    first = next(iter(heads))
    chosen, *others = at_full(heads[first])  # the head that detects and is drawn
    own = results
    if others:
        own = summarize(*mean_auc([chosen.logits], records.labels[test], records.folds[test], records.patient_keys()[test]), records.labels[test])
    if not config.rotate:
        labelled = split["train"] if config.finetune else part_of(split["train"], chosen.fraction, chosen.seed)
        head_seen = selfmis.data_used(records[labelled], records[split["val"]], labels=True)
        detector = as_detector(chosen, records.labels[split["val"]]) | dict(head_seen=head_seen)
        results["reliability"] = reliability(chosen.logits, records.labels[test], detector["temperature"])
        said = dict(results={name: selfmis.nan_to_none(own[name]) for name in (*GROUPS, "types")}, reliability=results["reliability"])
        selfmis.save(out / "probe.pt", content | detector | said | dict(kind="probe", config=results["config"]) | selfmis.environment())
    save_predictions(out / "predictions.npz", heads, records, test, None if config.rotate else split["val"])
    folds = f"fold {config.test_fold}" if not config.rotate else "each fold in turn"
    draw_roc(out / "roc.png", within_folds(chosen.logits, records.folds[test]), records.labels[test], own, f"{first} head, seed {chosen.seed}, {folds}")
    table = as_table(results)
    if len(set(config.fractions)) > 1:
        table += f"\n\nAUC by share of the training labels, mean ± standard deviation over {config.seeds} seed(s)\n{as_fractions(results)}"
    if config.seeds > 1:
        folds += f", mean of {config.seeds} seeds"
    if chosen.fraction < 1:
        folds += f", {100 * chosen.fraction:g} % of the training labels"
    (out / "results.md").write_text(f"{config.encoder}, lead {view.lead}, {view.sample_rate_hz:g} Hz, tested on {folds}\n\n{table}\n")
    selfmis.write_json(out / "results.json", results)  # with it the run is finished
    patients = len(np.unique(records.patient_keys()[test]))
    print(f"\nAUC on {folds}, {len(test):,} records of {patients:,} patients; in brackets the 95 % bootstrap interval by patient\n{table}")
    compare(out, config.compare)
    if "reliability" in results:
        said = ", ".join(f"{name} {value:.4f}" for name, value in results["reliability"].items())
        print(f"calibration of the nine types ({first} head, one temperature from the validation fold): {said}")
    print(f"cost: {selfmis.say_cost(results['cost'])} embedded\n{results['minutes']:.1f} min; written to {out}", flush=True)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------------------


def check_flags(config: ProbeConfig) -> None:
    if not all(0 < fraction <= 1 for fraction in config.fractions):
        raise ValueError(f"--fractions {' '.join(map(str, config.fractions))}: expected shares of the training records, above 0 and at most 1")
    kinds = {data.startswith("synthetic:") for data in config.data}
    if config.synthetic_only and (len(kinds) < 2 or config.rotate):
        raise ValueError("--synthetic-only: give real and synthetic --data, e.g. --data synthetic:15000 --data ptb-xl, and no --rotate")
    if config.rotate and (config.val_fold, config.test_fold) != (ProbeConfig.val_fold, ProbeConfig.test_fold):
        raise ValueError("--rotate: every fold tests in turn, and the one before it validates; leave --val-fold and --test-fold out")
    if config.rotate and len(kinds) > 1:
        raise ValueError("--rotate: synthetic records beside real ones would be tested too; leave one of them out")
    if config.finetune and config.head != "both":
        raise ValueError("--finetune trains its own head with the encoder; probe its best.pt with --head")
    if config.finetune and (config.seeds > 1 or config.baseline or config.rotate or len(config.fractions) > 1):
        others = "--seeds, --baseline, --rotate or several fractions"
        raise ValueError(f"--finetune trains one network: repeat it with another --seed, --fractions and --out instead of {others}")


def split_by_fold(records: Records, usable: np.ndarray, config: ProbeConfig) -> list[dict[str, np.ndarray]]:
    """Rows of train, val and test, no patient in two of them; with --rotate once for each test fold, the fold before it for val."""
    folds = records.folds[usable]
    have = np.unique(folds)
    turns = list(zip(np.roll(have, 1), have)) if config.rotate and len(have) > 2 else [(config.val_fold, config.test_fold)]
    splits = []
    for val, test in turns:
        split = {"train": usable[(folds != val) & (folds != test)], "val": usable[folds == val], "test": usable[folds == test]}
        for name, rows in split.items():
            if not len(rows):
                there = ", ".join(map(str, have))
                raise ValueError(f"no usable record to {name} on (--val-fold {val}, --test-fold {test}); there are records of the folds {there}")
        patients = [set(records.patient_keys()[rows].tolist()) for rows in split.values()]
        if patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2]:
            raise ValueError("a patient has records in two of the three parts; check strat_fold in ptbxl_database.csv")
        if not math.isfinite(macro(records.labels[split["val"]], np.zeros(records.labels[split["val"]].shape))):
            raise ValueError(f"--val-fold {val}: no statement has positives and negatives in its {len(split['val'])} records; give more data")
        splits.append(split)
    return splits


def part_of(rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A random share of the training records, as in the paper's Table 3: rare types may vanish.  Smaller shares lie in larger ones."""
    if fraction == 1:
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[: max(1, round(fraction * len(rows)))])


def describe(config: ProbeConfig, records: Records, split: dict, unlabelled: int, view, encoder, ranks: Ranks) -> None:
    """What is trained and tested on, so that a wrong copy of the data is noticed."""
    positives = {name: records.labels[rows].sum(0) for name, rows in split.items()}
    usable, turn = ", ".join(f"{len(rows):,} {name}" for name, rows in split.items()), " in the first turn" if config.rotate else ""
    ranks.print(f"{len(records):,} records with a diagnostic statement ({unlabelled:,} without one left out); usable{turn}: {usable}")
    each = (f"{t} " + "/".join(str(positives[name][STATEMENTS.index(t)]) for name in split) for t in MI_TYPES)
    ranks.print(f"positives{turn} (train/val/test): {'  '.join(each)}")
    ranks.print(
        f"{'fine-tuning' if config.finetune else 'probing'} an encoder of {sum(p.numel() for p in encoder.parameters()):,} parameters "
        f"({config.encoder}) on lead {view.lead}, {view.sample_rate_hz:g} Hz, {view.preprocessing['normalize']} "
        f"(filter {view.preprocessing['filter']}), {ranks.world} process(es) on {ranks.device.type}"
    )


def warn_if_seen(seen: list[dict], records: Records, test: np.ndarray, config: ProbeConfig, ranks: Ranks) -> None:
    """Data that trained or chose the encoder or its teacher among the test records; after labels of these data no rotation."""
    for tested in selfmis.data_seen(records[test], labels=True):
        for entry in seen:
            folds = sorted(set(tested.get("folds", ())) & set(entry.get("folds", range(1, 11)))) if entry["data"] == tested["data"] else []
            how = "chosen by" if entry.get("use") == "validation" else "trained on"
            how += f" fold {', '.join(map(str, folds))} of {tested['data']} with{'' if entry['labels'] else 'out'} labels"
            if config.rotate and folds and entry["labels"]:
                raise ValueError(f"--rotate: {config.encoder} or its teacher was {how}, so it cannot be tested there")
            if folds:
                ranks.print(f"warning: the encoder or its teacher was {how}; the test is not clean")


class Shown:
    """Records as the encoder sees them: a 12-lead encoder asked for one lead gets zeros for the others."""

    def __init__(self, encoder: ResNet1D, pairs: Pairs, view, ranks: Ranks):
        self.encoder, self.pairs, self.view, self.ranks = encoder, pairs, view, ranks
        self.records_per_second = math.nan  # of the encoder, by all processes together

    def batches(self, rows):
        for signals, _ in self.pairs.batches(rows):
            yield selfmis.with_empty_leads(signals, self.encoder, self.view.lead)

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the rows (N, D) float32, at their own row numbers; one pass, shared by all processes."""
        mine, started = rows[self.ranks.rank :: self.ranks.world], time.time()
        self.encoder.eval()
        batches = [mine[i : i + 256] for i in range(0, len(mine), 256)]
        parts = [torch.empty(0, self.encoder.embedding_dim)] + [selfmis.embed(self.encoder, signals, self.ranks.device) for signals in self.batches(batches)]
        features = np.zeros((len(self.pairs.dataset), self.encoder.embedding_dim), np.float32)
        features[rows] = self.ranks.gather_rows(torch.cat(parts), len(rows)).numpy()
        self.records_per_second = len(rows) / (time.time() - started)
        return features

    def cost(self) -> dict:
        """Table 4: what one record asks of the encoder, and this run of the machine."""
        return selfmis.cost([self.encoder], self.view, self.ranks.device) | dict(records_per_second=self.records_per_second)


# ----------------------------------------------------------------------------------------------------------------------
# Heads on frozen features
# ----------------------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """A trained head and what it says of the test records."""

    seed: int
    fraction: float
    weight: torch.Tensor  # (K, D)
    bias: torch.Tensor  # (K,)
    logits: np.ndarray  # (N, K)
    validation: np.ndarray  # (N, K), the same of the validation fold


def at_full(fits: list[Fit]) -> list[Fit]:
    """Those with the most labels, which the results are about."""
    return [fit for fit in fits if fit.fraction == max(fit.fraction for fit in fits)]


def probe_frozen(config: ProbeConfig, shown: Shown, y: np.ndarray, splits: list[dict], ranks: Ranks) -> tuple[dict, dict[str, list[Fit]]]:
    """(the encoder's part of a checkpoint, every head of it and with --baseline of a random encoder; none but in the first process)."""
    rows = np.unique(np.concatenate([part for split in splits for part in split.values()]))
    features = {"": shown.features(rows)}
    content = selfmis.encoder_content(shown.encoder, shown.view, shown.encoder.seen)
    if config.baseline and config.encoder != "random":
        torch.manual_seed(config.seed)  # of the same architecture
        shown.encoder = ResNet1D(**shown.encoder.architecture).to(ranks.device)
        features[", random encoder"] = shown.features(rows)
    heads = {}
    for whose, x in features.items() if ranks.first else ():
        heads |= train_heads(config, x, y, splits, ranks, whose)
    return content, heads


def train_heads(config: ProbeConfig, features: np.ndarray, y: np.ndarray, splits: list[dict], ranks: Ranks, whose: str) -> dict[str, list[Fit]]:
    """Every head (named with what `whose` says of the encoder), fraction and seed; of several splits the last head is kept.

    The test folds are scored and nothing else.
    """
    x, target, heads = torch.from_numpy(features), torch.from_numpy(y), {}
    for head, train in (("adam", adam_head), ("logistic", logistic_head)):
        for fraction in sorted(set(config.fractions), reverse=True) if config.head in (head, "both") else ():
            for seed in range(config.seed, config.seed + config.seeds):
                if head == "logistic" and fraction == 1 and seed > config.seed:
                    continue  # it has one solution
                logits = []
                for turn, split in enumerate(splits, 1):
                    rows, val = part_of(split["train"], fraction, seed), split["val"]
                    weight, bias, said = train(x[rows], target[rows], x[val], target[val], config, seed)
                    logits.append(score(features[split["test"]], weight, bias))
                    validation = score(features[val], weight, bias)
                    means = group_means(selfmis.macro_auc(y[val], validation)[1])
                    labels = (f", {len(rows):,} labels" if fraction < 1 else "") + (f", turn {turn} of {len(splits)}" if len(splits) > 1 else "")
                    ranks.print(f"{head} head{whose}, seed {seed}{labels}: {said} (nine {means['nine']:.4f}, six {means['six']:.4f})")
                heads.setdefault(head + whose, []).append(Fit(seed, fraction, weight, bias, np.concatenate(logits), validation))
    return heads


def score(features: np.ndarray, weight: torch.Tensor, bias: torch.Tensor) -> np.ndarray:
    """Logits (N, K) of a head."""
    return features @ weight.numpy().T + bias.numpy()


def macro(y: torch.Tensor, logits: torch.Tensor) -> float:
    """The mean over all 44 statements, by which everything is chosen."""
    return selfmis.macro_auc(y, logits)[0]


def adam_head(x, y, x_val, y_val, config: ProbeConfig, seed: int):
    """Table 8: Adam, cosine, early stopping.  Features are divided by one number, as a cosine loss leaves their scale open."""
    scale = x.square().mean().sqrt().clamp_min(1e-12)
    generator = torch.Generator().manual_seed(seed)
    bound = x.shape[1] ** -0.5
    weight = (2 * bound * torch.rand(y.shape[1], x.shape[1], generator=generator) - bound).requires_grad_()
    bias = torch.zeros(y.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
    x, x_val, steps = x / scale, x_val / scale, -(-len(x) // config.batch_size)
    best, kept = (-math.inf, 0), None
    for epoch in range(config.epochs):
        for step, rows in enumerate(torch.randperm(len(x), generator=generator).split(config.batch_size)):
            optimizer.param_groups[0]["lr"] = selfmis.cosine_lr(config.lr, epoch * steps + step, config.epochs * steps)
            loss = F.binary_cross_entropy_with_logits(F.linear(x[rows], weight, bias), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            auc = macro(y_val, F.linear(x_val, weight, bias))
        if auc > best[0]:
            best, kept = (auc, epoch), (weight.detach() / scale, bias.detach().clone())
        elif epoch - best[1] >= config.patience:
            break
    return *kept, f"best epoch {best[1] + 1} of {config.epochs}, macro AUC {best[0]:.4f} on the validation fold"


def logistic_head(x, y, x_val, y_val, config: ProbeConfig, seed: int):
    """Logistic regression with an L2 penalty on standardised features, solved to convergence.

    Its strength is the one of STRENGTHS with the best validation AUC; the search goes from strong to weak, in float32,
    and ends when two are worse than one before; the chosen one is solved again in float64.  In the principal axes of the
    features the Hessian is nearly diagonal, which `newton` likes; turning the axes does not change the penalty.
    """
    mean, deviation = x.double().mean(0), x.double().std(0)
    deviation[~(deviation > 0)] = 1  # a constant feature, or a single record
    z, z_val = (x - mean) / deviation, (x_val - mean) / deviation
    variance, axes = torch.linalg.eigh(z.T @ z / len(z))
    z, z_val = (F.pad(v @ axes, (0, 1), value=1) for v in (z, z_val))  # the last column is the bias
    share = y.double().mean(0).clamp(1 / (2 * len(y)), 1 - 1 / (2 * len(y)))
    curvature = torch.cat([variance.clamp_min(0), torch.ones(1)])[:, None] * share * (1 - share)  # (D + 1, K)
    weight = torch.zeros_like(curvature)
    weight[-1] = (share / (1 - share)).log()
    best, worse = (-math.inf,), 0
    for strength in STRENGTHS:
        weight = newton(z.float(), y.float(), weight.float(), curvature.float(), strength, 1e-5).double()
        auc = macro(y_val, z_val @ weight)
        best, worse = ((auc, strength, weight), 0) if auc > best[0] else (best, worse + 1)
        if worse == 2:
            break
    auc, strength, weight = best
    weight = newton(z, y.double(), weight, curvature, strength, 1e-8)
    weight, bias = (axes @ weight[:-1]).T / deviation, weight[-1]
    return weight.float(), (bias - weight @ mean).float(), f"L2 strength {strength:.3g}, macro AUC {auc:.4f} on the validation fold"


def newton(z, y, weight, curvature, strength: float, tolerance: float):
    """weight (D + 1, K) of the least mean logistic loss + strength / 2 |weight|^2, the last row (bias) free of penalty.

    All K problems at once, each with its own step: Newton's method, its equations solved by conjugate gradients with the
    approximate diagonal `curvature` of the Hessian, steps halved until the loss falls.  Ends where no gradient exceeds
    `tolerance`, or where no loss falls by more than its rounding.
    """
    penalty = torch.full_like(weight[:, :1], strength)
    penalty[-1] = 0
    diagonal, logits = curvature + penalty, z @ weight  # (D + 1, K), (N, K)

    def objective(logits, weight):  # (K,)
        return F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(0) + (penalty * weight.square()).sum(0) / 2

    for _ in range(100):
        share = logits.sigmoid()
        residual = -(z.T @ (share - y) / len(y) + penalty * weight)  # minus the gradient
        if residual.abs().max() <= tolerance:
            break
        spread, step = share * (1 - share) / len(y), torch.zeros_like(weight)
        scaled = residual / diagonal
        direction, length = scaled, (residual * scaled).sum(0)
        start = length
        for _ in range(50):
            product = z.T @ (spread * (z @ direction)) + penalty * direction
            rate = length / (direction * product).sum(0).clamp_min(1e-30)
            step, residual = step + rate * direction, residual - rate * product
            scaled = residual / diagonal
            before, length = length, (residual * scaled).sum(0)
            if (length <= 1e-3 * start).all():
                break
            direction = scaled + length / before.clamp_min(1e-30) * direction
        change, now, size = z @ step, objective(logits, weight), torch.ones_like(start)
        for _ in range(30):
            worse = objective(logits + size * change, weight + size * step) > now
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        size = torch.where(worse, 0.0, size)
        logits, weight = logits + size * change, weight + size * step
        if (now - objective(logits, weight) <= 10 * torch.finfo(now.dtype).eps * now).all():
            break
    return weight


# ----------------------------------------------------------------------------------------------------------------------
# Training the encoder too
# ----------------------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """An encoder with one logit a statement."""

    def __init__(self, encoder: ResNet1D):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.embedding_dim, len(STATEMENTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def finetune(config: ProbeConfig, shown: Shown, y: np.ndarray, split: dict, out: Path, ranks: Ranks) -> tuple[dict, dict[str, list[Fit]], float]:
    """Supervised training of encoder and head with Table 8's recipe and Table 7's clipping.

    Returns (the best epoch's part of a checkpoint, its head, minutes that earlier starts took).  best.pt is the epoch of the
    best validation macro AUC.
    """
    began = time.time()
    model = Classifier(shown.encoder).to(ranks.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
    precision, scaler, amp = selfmis.autocast(ranks.device, config.amp)
    progress = dict(epoch=0, best=-math.inf, best_epoch=0, entry={}, minutes=0.0)
    last = selfmis.read_last(config, out, ranks)
    if last:
        selfmis.restore(last, model, optimizer, scaler, amp, out)
        progress = {name: last[name] for name in progress}
        ranks.print(f"{out}: going on at epoch {progress['epoch'] + 1}")
    earlier = progress["minutes"]
    if config.resume and ranks.first:
        selfmis.rewind_log(out / "log.jsonl", progress["epoch"], 0, progress["entry"])
    ddp = selfmis.distribute(model, config, ranks)
    shown.pairs.make_resident()
    records = shown.pairs.dataset.records
    seen = shown.encoder.seen + selfmis.data_used(records[split["train"]], records[split["val"]], labels=True)
    head = lambda: (model.head.weight.detach().cpu().clone(), model.head.bias.detach().cpu().clone())
    content = lambda: selfmis.encoder_content(model.encoder, shown.view, seen) | dict(kind="finetune", head=head(), config=dataclasses.asdict(config))
    train, W = split["train"], ranks.world
    steps = len(selfmis.epoch_batches(train, config, 0, ranks))
    target = torch.from_numpy(y)
    best = selfmis.read_checkpoint(out / "best.pt") if last and ranks.first else None
    while progress["epoch"] < config.epochs and progress["epoch"] - progress["best_epoch"] < config.patience:
        epoch, started, losses = progress["epoch"], time.time(), []
        mine = selfmis.epoch_batches(train, config, epoch, ranks)
        for step, (rows, signals) in enumerate(zip(mine, shown.batches(mine))):
            optimizer.param_groups[0]["lr"] = selfmis.cosine_lr(config.lr, epoch * steps + step, config.epochs * steps)
            with precision():
                logits = ddp(signals)
            loss = F.binary_cross_entropy_with_logits(logits.float(), target[rows].to(ranks.device))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        loss = float(np.mean(ranks.gather_objects(float(torch.stack(losses).mean()))))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {epoch + 1}; last.pt is from before: start again with --overwrite and a lower --lr or --amp off")
        rate = steps * config.batch_size * W / (time.time() - started)
        features = torch.from_numpy(shown.features(split["val"])[split["val"]])
        with torch.no_grad():
            auc = macro(y[split["val"]], model.head(features.to(ranks.device)).float().cpu())  # the same in every process
        improved = auc > progress["best"]
        entry = dict(epoch=epoch + 1, train_loss=loss, val_macro_auc=auc, records_per_second=rate)
        progress |= dict(epoch=epoch + 1, best=max(auc, progress["best"]), best_epoch=epoch + 1 if improved else progress["best_epoch"], entry=entry)
        progress["minutes"] = earlier + (time.time() - began) / 60
        if ranks.first:
            if improved:
                best = content()
                selfmis.save(out / "best.pt", best | dict(classes=list(STATEMENTS), metrics=dict(val_macro_auc=auc), **selfmis.environment()))
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), world=W, amp=amp)
            selfmis.save(out / "last.pt", content() | progress | state)
            selfmis.append_json(out / "log.jsonl", **entry)
            print(f"epoch {epoch + 1}/{config.epochs} | train loss {loss:.4f} | macro AUC {auc:.4f} on the validation fold | {rate:,.0f} ECG/s", flush=True)
    weights = ranks.gather_objects(best)[0]  # every process scores its share of the test fold with the best epoch
    selfmis.load_strictly(model.encoder, weights["encoder"], out / "best.pt")
    features = shown.features(np.concatenate([split["val"], split["test"]]))
    logits = (score(features[split[part]], *weights["head"]) for part in ("test", "val"))
    return weights, {"finetune": [Fit(config.seed, config.fractions[0], *weights["head"], *logits)]}, earlier


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def evaluate(heads: dict[str, list[Fit]], y: np.ndarray, folds: np.ndarray, patients: np.ndarray) -> dict:
    """results.json without its settings.  Intervals are bootstrap percentiles by patient, of the mean over seeds."""
    results, runs = {}, []
    for head, fits in heads.items():
        for fit in fits:
            auc = selfmis.macro_auc(y, within_folds(fit.logits, folds))[1]
            types = {t: float(auc[STATEMENTS.index(t)]) for t in MI_TYPES}
            runs.append(dict(seed=fit.seed, fraction=fit.fraction, head=head, **group_means(auc), types=types))
        logits = [fit.logits for fit in at_full(fits)]
        results[head] = summarize(*mean_auc(logits, y, folds, patients), y) | dict(any=any_infarct(logits, y, folds, patients))
    return dict(**results[next(iter(heads))], heads=results, runs=runs)


def group_means(auc: np.ndarray) -> dict[str, float]:
    """(K,) -> the mean of each group over the statements that are there."""
    return {group: float(np.nanmean(auc[columns(group)])) if np.isfinite(auc[columns(group)]).any() else math.nan for group in GROUPS}


def within_folds(logits: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Scores (N, K) that can be ranked together: of several folds, each with a head of its own, the percentile in the fold."""
    if len(np.unique(folds)) == 1:
        return logits
    from scipy.stats import rankdata

    percentile = np.empty_like(logits)
    for fold in np.unique(folds):
        percentile[folds == fold] = rankdata(logits[folds == fold], axis=0) / (1 + (folds == fold).sum())
    return percentile


def mean_auc(logits, y: np.ndarray, folds: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds of the AUC (K,) and of its bootstrap draws (R, K)."""
    scores = [within_folds(one, folds) for one in logits]
    return np.mean([selfmis.macro_auc(y, one)[1] for one in scores], 0), np.mean([selfmis.bootstrap_auc(y, one, patients) for one in scores], 0)


def any_infarct(logits, y: np.ndarray, folds: np.ndarray, patients: np.ndarray) -> dict[str, dict]:
    """AUC of the probability that there is any of the nine, 1 - prod(1 - p): against all other records, and against the normal ones."""
    infarct, found = y[:, columns("nine")].any(1), {}
    for other, rows in (("others", infarct | True), ("NORM", infarct | (y[:, STATEMENTS.index("NORM")] > 0))):
        if not infarct.any():
            found[other] = dict(auc=math.nan, low=math.nan, high=math.nan, positives=0, negatives=int(rows.sum()))
            continue
        scores = [np.logaddexp(0, one[rows][:, columns("nine")]).sum(1, keepdims=True) for one in logits]  # -log(1 - p), summed
        auc, draws = mean_auc(scores, infarct[rows, None], folds[rows], patients[rows])
        low, high = selfmis.interval(draws[:, 0])
        found[other] = dict(auc=float(auc[0]), low=low, high=high, positives=int(infarct.sum()), negatives=int((~infarct[rows]).sum()))
    return found


def calibrate(logits: np.ndarray, y: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    """What makes a detector of a head, from the validation fold: (temperature, {operating point: (K, 3)}).

    sigmoid(logit / temperature) has the least logistic loss over all statements; a temperature for each, or a shift, fits the
    few positives of a fold and was worse on its other half.  Points: the best Youden index, and the highest threshold with a
    sensitivity of 90 %; each threshold (positive at or above it), sensitivity, specificity; NaN for an absent statement.
    """
    flat, one = torch.from_numpy(logits).double().reshape(-1, 1), torch.ones(1, 1, dtype=torch.float64)
    slope = newton(flat, torch.from_numpy(y).double().reshape(-1, 1), one, one, 0.0, 1e-9).item()
    temperature = 1 / slope if slope > 1e-3 else 1.0
    points = {name: torch.full((y.shape[1], 3), math.nan) for name in ("youden", "sensitivity_90")}
    for k in np.flatnonzero(y.any(0) & ~y.all(0)):
        p = torch.sigmoid(torch.from_numpy(logits[:, k]) / temperature).numpy()  # rounded as a detector rounds
        order = np.argsort(-p, kind="stable")
        last = np.append(p[order][1:] != p[order][:-1], True)  # equal scores pass together
        hits = y[order, k].astype(int)
        sensitivity, specificity = (np.cumsum(hits) / hits.sum())[last], (1 - np.cumsum(1 - hits) / (1 - hits).sum())[last]
        scores = np.append(p[order][last], 0.0)
        for name, at in (("youden", np.argmax(sensitivity + specificity)), ("sensitivity_90", np.argmax(sensitivity >= 0.9))):
            threshold = (scores[at] + scores[at + 1]) / 2  # between two records, so that no rounding decides
            points[name][k] = torch.tensor([threshold, sensitivity[at], specificity[at]])
    return temperature, points


def as_detector(fit: Fit, y: np.ndarray) -> dict:
    """The part of probe.pt that `load_detector` reads beside the encoder; y: labels of the validation fold."""
    temperature, points = calibrate(fit.validation, y)
    positives = torch.from_numpy(y.sum(0, dtype=int))
    return dict(head=(fit.weight, fit.bias), classes=list(STATEMENTS), temperature=temperature, points=points, positives=positives)


def reliability(logits: np.ndarray, y: np.ndarray, temperature: float) -> dict[str, float]:
    """Means over the nine types on the test fold: Brier score, and expected calibration error over ten bins of equal size."""
    nine = columns("nine")
    p, hits, errors = 1 / (1 + np.exp(-logits[:, nine].astype(np.float64) / temperature)), y[:, nine], []
    for k in range(len(nine)):
        bins = np.array_split(np.argsort(p[:, k], kind="stable"), 10)
        errors.append(sum(len(rows) * abs(p[rows, k].mean() - hits[rows, k].mean()) for rows in bins if len(rows)) / len(p))
    return dict(temperature=temperature, ece=float(np.mean(errors)), brier=float(np.square(p - hits).mean()))


def save_predictions(path: Path, heads: dict[str, list[Fit]], records: Records, test: np.ndarray, val: np.ndarray | None) -> None:
    """predictions.npz: logits (seeds, N, 44) of each head, the first of the first head as `logits`; the validation fold's too, to choose settings by."""
    arrays = dict(labels=records.labels[test], fold=records.folds[test], patient=records.patients[test])
    arrays["record"] = np.array([records.name(i) for i in test])
    if val is not None:
        arrays |= dict(validation_labels=records.labels[val], validation_patient=records.patients[val])
    for head, fits in heads.items():
        name = head.replace(", ", "_").replace(" ", "_")
        arrays[f"logits_{name}"] = np.stack([fit.logits for fit in at_full(fits)]).astype(np.float32)
        if val is not None:
            arrays[f"validation_logits_{name}"] = np.stack([fit.validation for fit in at_full(fits)]).astype(np.float32)
    arrays["logits"] = next(value for name, value in arrays.items() if name.startswith("logits_"))[0]
    selfmis.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def read_predictions(folder: Path, labels: np.ndarray, folds: np.ndarray, patients: np.ndarray) -> dict:
    """{head: test logits (seeds, N, K)} of another run; ValueError unless it was tested on the same records."""
    try:
        with np.load(folder / "predictions.npz") as saved:
            arrays = dict(saved)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--compare {folder}: no readable predictions.npz in it; give the folder of a finished run of train_probe.py") from error
    if not all(np.array_equal(arrays.get(name), own) for name, own in (("labels", labels), ("fold", folds), ("patient", patients))):
        counts = f"its {len(arrays.get('labels', ())):,} test records are not this run's {len(labels):,}"
        raise ValueError(f"--compare {folder}: {counts}; both need the same --data, --test-fold and --limit")
    return {name.removeprefix("logits_"): value for name, value in arrays.items() if name.startswith("logits_")}


def compare(out: Path, others: list[str]) -> None:
    """This finished run minus others, head by head, a fine-tuned one minus each of the other's; into results.json and results.md."""
    if not others:
        return
    with np.load(out / "predictions.npz") as saved:
        test = saved["labels"], saved["fold"], saved["patient"]
    results = json.loads((out / "results.json").read_text())
    compared = results.setdefault("compared", {})
    mine = {head: mean_auc(logits, *test) for head, logits in read_predictions(out, *test).items()}
    for other in others:
        theirs = {head: mean_auc(logits, *test) for head, logits in read_predictions(Path(other), *test).items()}
        encoders = [head for head in theirs if not head.endswith("random_encoder")]  # the baseline beside them has no other partner
        pairs = [(a, b) for a in mine for b in ([a] if a in theirs else [] if a.endswith("random_encoder") else encoders)]
        compared[other] = {f"{a} - {b}": summarize(mine[a][0] - theirs[b][0], mine[a][1] - theirs[b][1], test[0]) for a, b in pairs}
    said = []
    for other, heads in compared.items():
        table = as_table(dict(heads=heads, types=results["types"]), "{:+.3f}")
        said.append(f"\nthis run minus {other}: difference of AUC with its 95 % interval, paired by patient\n{table}\n")
    print("".join(said), flush=True)
    (out / "results.md").write_text((out / "results.md").read_text().split("\nthis run minus ")[0] + "".join(said))
    selfmis.write_json(out / "results.json", results)


def columns(group: str) -> list[int]:
    return [STATEMENTS.index(statement) for statement in GROUPS[group]]


def summarize(auc: np.ndarray, draws: np.ndarray, y: np.ndarray) -> dict:
    """auc (K,), its bootstrap draws (R, K) -> means and types with intervals; absent classes are left out of means."""
    present = np.isfinite(auc)
    summary = {}
    for group in GROUPS:
        chosen = [k for k in columns(group) if present[k]]
        low, high = selfmis.interval(draws[:, chosen].mean(1)) if chosen else (math.nan, math.nan)
        summary[group] = dict(mean=float(auc[chosen].mean()) if chosen else math.nan, low=low, high=high, classes=len(chosen))
    summary["types"] = {}
    for t in MI_TYPES:
        k = STATEMENTS.index(t)
        low, high = selfmis.interval(draws[:, k])
        summary["types"][t] = dict(auc=float(auc[k]), low=low, high=high, positives=int(y[:, k].sum()))
    return summary


def as_table(results: dict, form: str = "{:.3f}") -> str:
    """The nine types, their three means and all infarcts as one, a column for each head, as Markdown."""
    heads = results["heads"]

    def cell(c: dict, key: str) -> str:
        absent = c[key] is None or math.isnan(c[key])
        return f"{'absent' if absent else '{} ({} to {})'.format(*(form.format(c[k]) for k in (key, 'low', 'high'))):<24}"

    lines = [f"| | positives | {' | '.join(f'{head:<24}' for head in heads)} |", "|---|--:|" + "---|" * len(heads)]
    for t in MI_TYPES:
        cells = [summary["types"][t] for summary in heads.values()]
        lines.append(f"| {t:<17} | {cells[0]['positives']:>4} | {' | '.join(cell(c, 'auc') for c in cells)} |")
    for group, name in NAMES.items():
        cells = [summary[group] for summary in heads.values()]
        total = sum(c["positives"] for t, c in results["types"].items() if t in GROUPS[group]) if group != "diagnostic" else ""
        missing = len(GROUPS[group]) - cells[0]["classes"]
        name += f" ({missing} absent)" if missing else ""
        lines.append(f"| {name:<17} | {total:>4} | {' | '.join(cell(c, 'mean') for c in cells)} |")
    for other in results["heads"][next(iter(heads))].get("any", ()):
        cells = [summary["any"][other] for summary in heads.values()]
        lines.append(f"| {f'any MI vs. {other}':<17} | {cells[0]['positives']:>4} | {' | '.join(cell(c, 'auc') for c in cells)} |")
    return "\n".join(lines)


def as_fractions(results: dict) -> str:
    """Table 3: the types and their means, a column for each head and share of the labels."""
    cells = {}
    for run in results["runs"]:
        cells.setdefault(f"{run['head']}, {100 * run['fraction']:g} %", []).append(run["types"] | {NAMES[group]: run[group] for group in GROUPS})
    lines = ["| | positives | " + " | ".join(cells) + " |", "|---|--:|" + "---|" * len(cells)]
    for row in (*MI_TYPES, *NAMES.values()):
        values = [[run[row] for run in runs] for runs in cells.values()]
        said = ["absent" if math.isnan(v[0]) else f"{np.mean(v):.3f}" + (f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else "") for v in values]
        lines.append(f"| {row} | {results['types'][row]['positives'] if row in results['types'] else ''} | {' | '.join(said)} |")
    return "\n".join(lines)


def draw_roc(path: Path, logits: np.ndarray, y: np.ndarray, results: dict, title: str) -> None:
    """ROC curves of the nine types."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is left out: it needs the package matplotlib")
        return
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="1 - specificity", ylabel="sensitivity", aspect="equal", xlim=(0, 1), ylim=(0, 1.005))
    axes.plot([0, 1], [0, 1], color="0.8", lw=0.8)
    for t in MI_TYPES:
        k, c = STATEMENTS.index(t), results["types"][t]
        if math.isnan(c["auc"]):
            continue
        hits = y[np.argsort(-logits[:, k], kind="stable"), k]
        false, true = (np.append(0, np.cumsum(passed)) / passed.sum() for passed in (1 - hits, hits))
        rare = c["positives"] < 20
        axes.plot(false, true, lw=0.8 if rare else 1.6, ls=":" if rare else "-", label=f"{t} {c['auc']:.3f} (n = {c['positives']})")
    axes.legend(loc="lower right", fontsize=8, title="AUC; dotted: fewer than 20 positives", title_fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    selfmis.run_script(main, ProbeConfig, __doc__)
