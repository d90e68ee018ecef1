"""How well an encoder's embedding of lead I tells nine types of infarction apart (paper, sections 3.2 and 3.3, Table 8).

    python train_probe.py --encoder runs/pretrain/best.pt                                # no data: synthetic ECG
    python train_probe.py --data ptb-xl --encoder runs/a/best.pt --out runs/a-probe      # linear heads on the frozen encoder
    python train_probe.py --data ptb-xl --finetune --lead all --out runs/teacher         # a supervised 12-lead network

Trains on all folds but two, chooses on the validation fold, and touches the test fold once, at the end.  Writes
OUT/probe.pt, results.json, results.md, roc.png, predictions.npz and config.json; with --finetune best.pt and last.pt too.
"""

import dataclasses
import json
import math
import time
from pathlib import Path

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
    baseline: bool = flag(False, "probe a random encoder of the same size too, beside this one")
    patience: int = flag(5, "epochs without a better validation macro AUC before training stops", type=int)


# Without data: as in train_pretrain.py, whose best.pt fits.
DEMO = dict(data=["synthetic:3000"], size="small", sample_rate=100, baseline=True)
SYNTHETIC_STREAM = 2  # seed of the synthetic records here; train_pretrain.py draws others
STRENGTHS = tuple(10.0 ** (-k / 2) for k in range(9))  # of the L2 penalty, from strong to weak
GROUPS = {"nine": MI_TYPES, "six": SIX_TYPES, "diagnostic": STATEMENTS}  # of statements; each gets a mean
NAMES = {"nine": "nine-type mean", "six": "six-type mean", "diagnostic": f"all {len(STATEMENTS)} statements"}


def main(config: ProbeConfig) -> dict:
    """Probe or fine-tune; returns the content of results.json (in the first process)."""
    started = time.time()
    ranks = selfmis.join_ranks(config.device, config.seed)
    if not config.data:
        config = selfmis.demo_settings(config, {k: v for k, v in DEMO.items() if k in ("data", "baseline") or config.encoder == "random"}, ranks)
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
    out = selfmis.open_run(config, ranks)
    if config.resume and (out / "results.json").exists():
        then = json.loads((out / "results.json").read_text())["config"]
        now = json.loads(json.dumps(dataclasses.asdict(config)))
        if any(now[name] != then.get(name) for name in now if name not in selfmis.FREE_ON_RESUME):
            raise ValueError(f"--resume: {out} holds the results of other settings, see its config.json; give another --out, or --overwrite")
        ranks.print(f"{out}: finished already, see {out / 'results.md'}")
        return {}
    pairs = selfmis.read_pairs(config, records, view, ranks, "records")
    split = split_by_fold(records, pairs.usable, config)
    describe(config, records, split, int(unlabelled.sum()), view, encoder, ranks)
    warn_if_seen(encoder.seen, records, config, ranks)

    if not math.isfinite(macro(records.labels[split["val"]], np.zeros(records.labels[split["val"]].shape))):
        raise ValueError(f"--val-fold {config.val_fold}: no statement has positives and negatives in its {len(split['val'])} records; give more data")
    if config.finetune and (config.seeds > 1 or config.baseline):
        raise ValueError("--finetune trains one network: repeat it with another --seed and --out instead of --seeds or --baseline")
    if ranks.first:
        counts = {name: len(rows) for name, rows in split.items()} | dict(unlabelled=int(unlabelled.sum()), unusable=pairs.unusable)
        selfmis.write_json(out / "config.json", dict(config=dataclasses.asdict(config), view=view._asdict(), records=counts, world=ranks.world, **selfmis.environment()))

    y = records.labels.astype(np.float32)
    shown = Shown(encoder, pairs, view, ranks)
    if config.finetune:
        content, logits = finetune(config, shown, y, split, out, ranks)
        heads = {"finetune": [(*content["head"], logits[split["test"]])]}
    else:
        rows = np.concatenate(list(split.values()))
        features = {"": shown.features(rows)}
        content = selfmis.encoder_content(encoder, view, encoder.seen)
        if config.baseline and config.encoder != "random":
            torch.manual_seed(config.seed)  # the one that --encoder random would test
            shown.encoder = ResNet1D(**encoder.architecture).to(ranks.device)
            features[", random encoder"] = shown.features(rows)
        heads = {}
        for whose, x in features.items() if ranks.first else ():
            heads |= {head + whose: runs for head, runs in train_heads(config, x, y, split, ranks).items()}
    ranks.barrier()
    if not ranks.first:
        return {}

    test = split["test"]
    results = evaluate(heads, records.labels[test], records.patient_keys()[test], config)
    first = next(iter(heads))
    weight, bias, _ = heads[first][0]
    settings = dict(config=dataclasses.asdict(config), **selfmis.environment())
    head_seen = selfmis.data_seen(records[split["train"]], labels=True)
    selfmis.save(out / "probe.pt", content | dict(kind="probe", head=(weight, bias), classes=list(STATEMENTS), head_seen=head_seen, **settings))
    arrays = {f"logits_{name.replace(', ', '_').replace(' ', '_')}": np.stack([run[2] for run in runs]).astype(np.float32) for name, runs in heads.items()}
    arrays |= dict(logits=heads[first][0][2].astype(np.float32), labels=records.labels[test], fold=records.folds[test], patient=records.patients[test])
    arrays["record"] = np.array([records.name(i) for i in test])
    selfmis.write_atomically(out / "predictions.npz", lambda file: np.savez_compressed(file, **arrays))
    results |= dict(config=dataclasses.asdict(config), minutes=(time.time() - started) / 60)
    table = as_table(results)
    (out / "results.md").write_text(f"{config.encoder}, lead {view.lead}, {view.sample_rate_hz:g} Hz, test fold {config.test_fold}\n\n{table}\n")
    draw_roc(out / "roc.png", heads[first][0][2], records.labels[test], results)
    selfmis.write_json(out / "results.json", nan_to_none(results))  # last: with it the run is finished
    ranks.print(f"\nAUC on test fold {config.test_fold}, {len(test):,} records of {len(np.unique(records.patients[test])):,} patients; in brackets the 95 % bootstrap interval by patient\n{table}")
    ranks.print(f"{results['minutes']:.1f} min; written to {out}")
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------------------


def split_by_fold(records: Records, usable: np.ndarray, config: ProbeConfig) -> dict[str, np.ndarray]:
    """Rows of train, val and test; no patient in two of them."""
    folds = records.folds[usable]
    split = {"train": usable[(folds != config.val_fold) & (folds != config.test_fold)], "val": usable[folds == config.val_fold], "test": usable[folds == config.test_fold]}
    for name, rows in split.items():
        if not len(rows):
            have = ", ".join(map(str, np.unique(folds)))
            raise ValueError(f"no usable record to {name} on (--val-fold {config.val_fold}, --test-fold {config.test_fold}); there are records of the folds {have}")
    patients = [set(records.patient_keys()[rows].tolist()) for rows in split.values()]
    if patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2]:
        raise ValueError("a patient has records in two of the three parts; check strat_fold in ptbxl_database.csv")
    return split


def describe(config: ProbeConfig, records: Records, split: dict, unlabelled: int, view, encoder, ranks: Ranks) -> None:
    """What is trained and tested on, so that a wrong copy of the data is noticed."""
    positives = {name: records.labels[rows].sum(0) for name, rows in split.items()}
    ranks.print(f"{len(records):,} records with a diagnostic statement ({unlabelled:,} without one left out); usable: " + ", ".join(f"{len(rows):,} {name}" for name, rows in split.items()))
    ranks.print("positives (train/val/test): " + "  ".join(f"{t} " + "/".join(str(positives[name][STATEMENTS.index(t)]) for name in split) for t in MI_TYPES))
    ranks.print(
        f"{'fine-tuning' if config.finetune else 'probing'} an encoder of {sum(p.numel() for p in encoder.parameters()):,} parameters ({config.encoder}) on "
        f"lead {view.lead}, {view.sample_rate_hz:g} Hz, {view.preprocessing['normalize']} (filter {view.preprocessing['filter']}), {ranks.world} process(es) on {ranks.device.type}"
    )


def warn_if_seen(seen: list[dict], records: Records, config: ProbeConfig, ranks: Ranks) -> None:
    """Training data of the encoder or its teacher among the test records."""
    for kind, _ in records.sources:
        for entry in seen:
            if entry["data"] == kind and config.test_fold in entry.get("folds", range(1, 11)):
                ranks.print(f"warning: the encoder or its teacher was trained on fold {config.test_fold} of {kind} {'with' if entry['labels'] else 'without'} labels; the test is not clean")


class Shown:
    """Records as the encoder sees them: a 12-lead encoder asked for one lead gets zeros for the others."""

    def __init__(self, encoder: ResNet1D, pairs: Pairs, view, ranks: Ranks):
        self.encoder, self.pairs, self.view, self.ranks = encoder, pairs, view, ranks

    def batches(self, rows):
        for signals, _ in self.pairs.batches(rows):
            if signals.shape[1] != self.encoder.leads:
                whole = signals.new_zeros(len(signals), self.encoder.leads, signals.shape[2])
                whole[:, selfmis.lead_index(self.view.lead)] = signals[:, 0]
                signals = whole
            yield signals

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the rows (N, D) float32, at their own row numbers; one pass, shared by all processes."""
        mine = rows[self.ranks.rank :: self.ranks.world]
        self.encoder.eval()
        batches = [mine[i : i + 256] for i in range(0, len(mine), 256)]
        parts = [torch.empty(0, self.encoder.embedding_dim)] + [selfmis.embed(self.encoder, signals, self.ranks.device) for signals in self.batches(batches)]
        features = np.zeros((len(self.pairs.dataset), self.encoder.embedding_dim), np.float32)
        features[rows] = self.ranks.gather_rows(torch.cat(parts), len(rows)).numpy()
        return features


# ----------------------------------------------------------------------------------------------------------------------
# Heads on frozen features
# ----------------------------------------------------------------------------------------------------------------------


def train_heads(config: ProbeConfig, features: np.ndarray, y: np.ndarray, split: dict, ranks: Ranks) -> dict[str, list]:
    """{head: [(weight (K, D), bias (K,), test logits) for each seed]}; the test fold is scored and nothing else."""
    x, target = {name: torch.from_numpy(features[rows]) for name, rows in split.items()}, {name: torch.from_numpy(y[rows]) for name, rows in split.items()}
    heads = {}
    for head in ("adam", "logistic") if config.head == "both" else (config.head,):
        heads[head] = []
        for seed in range(config.seed, config.seed + (config.seeds if head == "adam" else 1)):  # logistic has one solution
            fit = adam_head if head == "adam" else logistic_head
            weight, bias, said = fit(x["train"], target["train"], x["val"], target["val"], config, seed)
            ranks.print(f"{head} head, seed {seed}: {said}")
            heads[head].append((weight, bias, (x["test"] @ weight.T + bias).numpy()))
    return heads


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
    deviation[deviation == 0] = 1
    z = (x - mean) / deviation
    variance, axes = torch.linalg.eigh(z.T @ z / len(z))
    ones = torch.ones(len(z), 1, dtype=z.dtype)
    z, z_val = torch.cat([z @ axes, ones], 1), torch.cat([(x_val - mean) / deviation @ axes, ones[: len(x_val)]], 1)  # the last column is the bias
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
    objective = lambda logits, weight: F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(0) + (penalty * weight.square()).sum(0) / 2  # (K,)
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


def finetune(config: ProbeConfig, shown: Shown, y: np.ndarray, split: dict, out: Path, ranks: Ranks):
    """Supervised training of encoder and head with Table 8's recipe; best.pt is the epoch of the best validation macro AUC."""
    model = Classifier(shown.encoder).to(ranks.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
    precision, scaler, amp = selfmis.autocast(ranks.device, config.amp)
    progress = dict(epoch=0, best=-math.inf, best_epoch=0, entry={})
    last = selfmis.read_last(config, out, ranks)
    if last:
        selfmis.restore(last, model, optimizer, scaler, amp, out)
        progress = {name: last[name] for name in progress}
        ranks.print(f"{out}: going on at epoch {progress['epoch'] + 1}")
    if config.resume and ranks.first:
        selfmis.rewind_log(out / "log.jsonl", progress["epoch"], 0, progress["entry"])
    ddp = selfmis.distribute(model, config, ranks)
    shown.pairs.make_resident()
    seen = shown.encoder.seen + selfmis.data_seen(shown.pairs.dataset.records[split["train"]], labels=True)
    content = lambda: selfmis.encoder_content(model.encoder, shown.view, seen) | dict(head=(model.head.weight.detach().cpu().clone(), model.head.bias.detach().cpu().clone()))
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
            raise FloatingPointError(f"the loss is {loss} in epoch {epoch + 1}; last.pt is from before: lower --lr, or give --amp off, and --resume")
        rate = steps * config.batch_size * W / (time.time() - started)
        features = torch.from_numpy(shown.features(split["val"])[split["val"]])
        with torch.no_grad():
            auc = macro(y[split["val"]], model.head(features.to(ranks.device)).float().cpu())  # the same in every process
        improved = auc > progress["best"]
        entry = dict(epoch=epoch + 1, train_loss=loss, val_macro_auc=auc, records_per_second=rate)
        progress |= dict(epoch=epoch + 1, best=max(auc, progress["best"]), best_epoch=epoch + 1 if improved else progress["best_epoch"], entry=entry)
        if ranks.first:
            if improved:
                best = content()
                selfmis.save(out / "best.pt", best | dict(kind="finetune", classes=list(STATEMENTS), metrics=dict(val_macro_auc=auc), config=dataclasses.asdict(config), **selfmis.environment()))
            selfmis.save(out / "last.pt", content() | progress | dict(kind="finetune", model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), world=W, amp=amp, config=dataclasses.asdict(config)))
            selfmis.append_json(out / "log.jsonl", **entry)
            print(f"epoch {epoch + 1}/{config.epochs} | train loss {loss:.4f} | macro AUC {auc:.4f} on the validation fold | {rate:,.0f} ECG/s", flush=True)
    weights = ranks.gather_objects(best)[0]  # every process scores its share of the test fold with the best epoch
    selfmis.load_strictly(model.encoder, weights["encoder"], out / "best.pt")
    weight, bias = weights["head"]
    test = shown.features(split["test"])
    return weights, test @ weight.numpy().T + bias.numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def evaluate(heads: dict[str, list], y: np.ndarray, patients: np.ndarray, config: ProbeConfig) -> dict:
    """results.json without its settings.  Intervals are bootstrap percentiles by patient, of the mean over seeds."""
    results, runs = {}, []
    for head, fitted in heads.items():
        aucs, draws = [], []
        for seed, (_, _, logits) in enumerate(fitted, config.seed):
            auc = selfmis.macro_auc(y, logits)[1]
            draws.append(selfmis.bootstrap_auc(y, logits, patients))
            aucs.append(auc)
            groups = {group: float(np.nanmean(auc[columns(group)])) for group in GROUPS}
            runs.append(dict(seed=seed, fraction=1.0, head=head, **groups, types={t: float(auc[STATEMENTS.index(t)]) for t in MI_TYPES}))
        results[head] = summarize(np.mean(aucs, 0), np.mean(draws, 0), y)
    return dict(**results[next(iter(heads))], heads=results, runs=runs)


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


def nan_to_none(content):
    """JSON has no NaN."""
    if isinstance(content, dict):
        return {key: nan_to_none(value) for key, value in content.items()}
    if isinstance(content, list):
        return [nan_to_none(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def as_table(results: dict) -> str:
    """The nine types and the three means, a column for each head, as Markdown."""
    heads = results["heads"]
    cell = lambda auc, low, high: "absent" if math.isnan(auc) else f"{auc:.3f} ({low:.3f}-{high:.3f})"
    lines = [f"| | positives | {' | '.join(f'{head:<21}' for head in heads)} |", "|---|--:|" + "---|" * len(heads)]
    for t in MI_TYPES:
        cells = [summary["types"][t] for summary in heads.values()]
        lines.append(f"| {t:<17} | {cells[0]['positives']:>4} | {' | '.join(cell(c['auc'], c['low'], c['high']) for c in cells)} |")
    for group, name in NAMES.items():
        cells = [summary[group] for summary in heads.values()]
        total = sum(c["positives"] for t, c in results["types"].items() if t in GROUPS[group]) if group != "diagnostic" else ""
        missing = len(GROUPS[group]) - cells[0]["classes"]
        name += f" ({missing} absent)" if missing else ""
        lines.append(f"| {name:<17} | {total:>4} | {' | '.join(cell(c['mean'], c['low'], c['high']) for c in cells)} |")
    return "\n".join(lines)


def draw_roc(path: Path, logits: np.ndarray, y: np.ndarray, results: dict) -> None:
    """ROC curves of the nine types."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is left out: it needs the package matplotlib")
        return
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal", xlim=(0, 1), ylim=(0, 1.005))
    axes.plot([0, 1], [0, 1], color="0.8", lw=0.8)
    for t in MI_TYPES:
        k, c = STATEMENTS.index(t), results["types"][t]
        if math.isnan(c["auc"]):
            continue
        hits = y[np.argsort(-logits[:, k], kind="stable"), k]
        rare = c["positives"] < 20
        axes.plot(np.append(0, np.cumsum(1 - hits)) / (1 - hits).sum(), np.append(0, np.cumsum(hits)) / hits.sum(), lw=0.8 if rare else 1.6, ls=":" if rare else "-", label=f"{t} {c['auc']:.3f} (n = {c['positives']})")
    axes.legend(loc="lower right", fontsize=8, title="AUC; dotted: fewer than 20 positives", title_fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    selfmis.run_script(main, ProbeConfig, __doc__)
