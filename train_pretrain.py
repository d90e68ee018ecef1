"""Alignment pre-training: lead I learns to embed like all twelve leads (paper, 2 and Table 7).

    python train_pretrain.py                                   # no data: synthetic ECG, two minutes
    torchrun --nproc_per_node 4 train_pretrain.py --data mimic-iv-ecg --out runs/a \\
        --single 1_lead_ECGFounder.pth --multi 12_lead_ECGFounder.pth      # the paper

Writes OUT/best.pt (the encoder of the lowest validation loss), OUT/last.pt (for --resume),
OUT/log.jsonl and OUT/config.json.
"""

import dataclasses
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import selfmis
from selfmis import Config, InputSpec, Learner, Pairs, Ranks, Records, ResNet1D, SelfMIS
from selfmis import UsageError, flag

SECONDS_BETWEEN_LINES = 5
STEPS_PER_LOSS = 20  # between two looks at the loss, which make the device wait
VALIDATION_BATCH = 128  # the loss of a row grows with the batch; 128 keeps runs comparable
SYNTHETIC_STREAM = 1  # seed of the synthetic records here; train_probe.py draws others


@dataclasses.dataclass
class PretrainConfig(Config):
    """Flags of train_pretrain.py; the defaults are Table 7's."""

    out: str = flag("runs/pretrain", "folder of the run", metavar="DIR")
    batch_size: int = flag(128, "records of one process; the loss compares those of all processes")
    lr: float = flag(1e-4, "peak learning rate, cosine to 0")
    single: str = flag(
        "random", "f_s: an ECGFounder file, a checkpoint of ours, or random", metavar="PATH|random"
    )
    multi: str | None = flag(
        None, "the frozen 12-lead f_m, likewise; no default", metavar="PATH|random"
    )
    loss: str = flag(
        "paper",
        "Eq. (3): paper (fixed t, b), learnable (t, b), raw (plain product); softmax: InfoNCE",
        choices=selfmis.LOSSES,
    )
    local_negatives: bool = flag(False, "compare the records of one process only")
    weight_decay: float = flag(0.1, "of AdamW")
    warmup: int = flag(0, "steps of linear warm-up before the cosine")
    val_records: int = flag(5000, "the last N records of a list without folds validate")
    save_seconds: float = flag(600.0, "between two saves of last.pt within an epoch")

    @property
    def demonstrates(self) -> str:
        teacher = "a random teacher" if self.multi == "random" else self.multi
        loss = "InfoNCE" if self.loss == "softmax" else "Eq. (3)"
        return f"a demonstration on synthetic ECG, with {teacher} and {loss}"

    def demonstration(self) -> dict:
        """Table 7 is made for 800,035 records and four GPUs; this shows the method in two minutes.

        After its 126 steps Eq. (3) with a random teacher would still be on its plateau, so InfoNCE;
        and in float32, so that it prints the same on all processors but for rounding.
        """
        processes = int(os.environ.get("WORLD_SIZE", 1))
        settings = dict(data=["synthetic:3000"], multi="random", loss="softmax", epochs=7, lr=1e-3)
        settings |= dict(warmup=20, batch_size=max(1, 128 // processes), amp="off")
        if self.single == "random" and self.multi in (None, "random"):
            settings |= dict(size="small", sample_rate=100)
        return settings


@dataclasses.dataclass
class Training:
    """What one run holds while it trains."""

    kind = "pretrain"  # what its files say they are

    config: PretrainConfig
    ranks: Ranks
    out: Path
    spec: InputSpec
    pairs: Pairs
    train_rows: np.ndarray  # of the records, usable ones
    val_rows: np.ndarray
    model: SelfMIS
    learner: Learner
    training_data: list[dict]
    val_targets: torch.Tensor  # (N, D) teacher embeddings of the validation records
    teacher_digest: str
    records_per_second: float = math.nan  # of the last steps, by all processes together
    # Progress, which last.pt keeps:
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the running epoch
    losses: list[float] = dataclasses.field(default_factory=list)  # of the running epoch
    best: float = math.inf  # lowest validation loss
    last_entry: dict = dataclasses.field(default_factory=dict)  # of log.jsonl, of a whole epoch

    def step_loss(self, rows: np.ndarray, signals, targets) -> torch.Tensor:
        """Eq. (2) and (3) of this process's part of a batch."""
        offset = 0
        if not self.config.local_negatives:
            targets, offset = all_targets(targets, self.ranks)
        return self.learner.forward(signals, targets, offset)


PROGRESS = ("epoch", "step", "losses", "best", "last_entry")


def main(config: PretrainConfig, training_class: type[Training] = Training) -> dict:
    """Train; returns the last epoch's line of log.jsonl."""
    ranks = selfmis.join_ranks(config.device, config.seed)
    out = selfmis.open_run(config)
    single, teacher, spec = open_encoders(config)
    records = selfmis.gather_records(config, spec.sample_rate_hz, SYNTHETIC_STREAM)
    train_rows, val_rows = split(records, config, ranks)
    last = selfmis.read_last(config, out, ranks)
    if last is not None and last["epoch"] == config.epochs:
        ranks.print(f"{out}: finished already, best validation loss {last['best']:.4f}")
        return last["last_entry"]

    teacher.to(ranks.device)
    rows = np.concatenate([train_rows, val_rows])
    pairs = selfmis.read_pairs(config, records, rows, spec, ranks, teacher)
    run = prepare(config, ranks, out, spec, pairs, train_rows, val_rows, single, training_class)
    if last is None:
        selfmis.begin_run(out, config, describe(run), ranks)
        save_last(run)
    else:
        resume(run, last)
        del last  # as large as the model and its optimizer
    while run.epoch < config.epochs:
        train_one_epoch(run)
        metrics = validate(run)
        finish_epoch(run, metrics)
    say_what_next(run)
    return run.last_entry


def open_encoders(config: PretrainConfig) -> tuple[ResNet1D, ResNet1D, InputSpec]:
    """f_s, the frozen f_m, and how their input is made."""
    if config.multi is None:
        raise UsageError(
            "--multi: alignment needs a 12-lead teacher: 12_lead_ECGFounder.pth "
            "(huggingface.co/PKUDigitalHealth/ECGFounder), or best.pt of train_probe.py --finetune "
            "--lead all, or the word random"
        )
    single = selfmis.open_encoder(config.single, config.size, leads=1)
    teacher = selfmis.open_encoder(config.multi, config.size, leads=12)
    if teacher is not None and teacher.lead not in (None, "all"):
        raise UsageError(f"--multi {config.multi}: was trained on lead {teacher.lead} and zeros")
    students = {} if single is None else {config.single: single}
    teachers = {} if teacher is None else {config.multi: teacher}
    # The teacher's lead is all twelve: the student's counts.
    spec = selfmis.resolve_input(config, students | teachers, lead_from=students)
    if spec.lead == "all":
        raise UsageError("--lead all: pre-training aligns one lead; name it")
    if single is None:
        single = selfmis.random_encoder(1, config.size, like=teacher)
    if teacher is None:
        teacher = selfmis.random_encoder(12, config.size, like=single)
    if single.embedding_dim != teacher.embedding_dim:
        raise UsageError(
            f"--single embeds in {single.embedding_dim} dimensions, --multi in "
            f"{teacher.embedding_dim}; they must agree"
        )
    return single.eval(), teacher.eval().requires_grad_(False), spec


def split(records: Records, config: PretrainConfig, ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
    """Rows of training and validation records, of each collection its own share.

    Where there are folds, --val-fold validates and --test-fold is not even read; elsewhere the last
    records of the list validate.
    """
    train, val = [], []
    for c, collection in enumerate(records.collections):
        rows = np.flatnonzero(records.collection == c)
        folds = records.folds[rows]
        if folds.any():
            train.append(rows[(folds != config.val_fold) & (folds != config.test_fold)])
            val.append(rows[folds == config.val_fold])
        else:
            n = min(config.val_records, max(1, len(rows) // 10))
            if n < config.val_records:
                text = f"of {len(rows):,} records the last {n:,} validate, not"
                ranks.print(f"{collection.root}: {text} {config.val_records:,}")
            train.append(rows[:-n])
            val.append(rows[-n:])
    train, val = np.concatenate(train), np.concatenate(val)
    check_counts(train, val, config, ranks)
    return train, val


def check_counts(train: np.ndarray, val: np.ndarray, config: PretrainConfig, ranks: Ranks) -> None:
    """UsageError if these rows do not make an epoch."""
    if len(train) == 0 or len(val) == 0:
        counts = f"{len(train):,} records to train and {len(val):,} to validate on"
        raise UsageError(f"{counts}: give more --data or a larger --limit")
    selfmis.epoch_batches(train, config, 0, ranks)  # refuses a batch that they cannot fill


def usable_rows(pairs, train_rows, val_rows, config, ranks) -> tuple[np.ndarray, np.ndarray]:
    """Those of these rows that the pass could read; UsageError if they do not make an epoch."""
    train_rows = train_rows[np.isin(train_rows, pairs.usable)]
    val_rows = val_rows[np.isin(val_rows, pairs.usable)]
    check_counts(train_rows, val_rows, config, ranks)
    return train_rows, val_rows


def prepare(
    config, ranks, out, spec, pairs, train_rows, val_rows, single, training_class=Training
) -> Training:
    """Model, optimizer and all else that training needs; `resume` puts a resumed run on top."""
    train_rows, val_rows = usable_rows(pairs, train_rows, val_rows, config, ranks)
    # MIMIC's list is sorted by patient: batches of strangers, the same in every run.
    val_rows = val_rows[np.random.default_rng(0).permutation(len(val_rows))]
    model = SelfMIS(single, config.loss).to(ranks.device)
    records = pairs.dataset.records
    seen = selfmis.training_data(records[train_rows], records[val_rows], labels=False)
    val_targets = gather_targets(pairs, val_rows, ranks)
    return training_class(
        config=config,
        ranks=ranks,
        out=out,
        spec=spec,
        pairs=pairs,
        train_rows=train_rows,
        val_rows=val_rows,
        model=model,
        learner=Learner(model, make_optimizer(model, config), config, ranks),
        training_data=pairs.teacher.training_data + single.training_data + seen,
        val_targets=val_targets,
        teacher_digest=selfmis.weights_digest(pairs.teacher),
    )


def make_optimizer(model: SelfMIS, config: PretrainConfig) -> torch.optim.Optimizer:
    """AdamW of Table 7; a learnable t and b get a rate of their own and no weight decay."""
    encoder = list(model.encoder.parameters())
    groups = [dict(params=encoder, peak=config.lr, weight_decay=config.weight_decay)]
    if config.loss == "learnable":
        groups.append(dict(params=[model.log_scale, model.bias], peak=1e-2, weight_decay=0.0))
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8)


def describe(run: Training) -> dict:
    """Say what is going to happen, and return it for config.json."""
    config, spec = run.config, run.spec
    global_batch = config.batch_size * run.ranks.world_size
    steps = len(run.train_rows) // global_batch
    compared = config.batch_size if config.local_negatives else global_batch
    unit = F.normalize(run.val_targets, dim=-1)
    mean_cosine = float(unit.mean(0) @ unit.mean(0))  # of all pairs
    parameters = sum(p.numel() for p in run.model.parameters())
    processing = f"{spec.preprocessing['normalize']} (filter {spec.preprocessing['filter']})"
    run.ranks.print(
        f"training {parameters:,} parameters (f_s: {config.single}, f_m: {config.multi}) on lead "
        f"{spec.lead}, {spec.sample_rate_hz:g} Hz, {processing}, with {run.ranks.world_size} "
        f"process(es) on {run.ranks.device.type}, amp {run.learner.amp}\n"
        f"{len(run.train_rows):,} records, {steps:,} steps an epoch, {compared} records in the "
        f"loss of a step; {len(run.val_rows):,} validate\n"
        f"teacher: mean pairwise cosine {mean_cosine:.2f}"
    )
    if config.loss == "paper" and mean_cosine > 0.9:
        run.ranks.print("without a bias Eq. (3) learns little from embeddings that nearly coincide")
    if config.warmup >= config.epochs * steps:
        run.ranks.print(f"warning: --warmup {config.warmup} is longer than the run")
    return dict(
        input=spec._asdict(),
        training_records=len(run.train_rows),
        validation_records=len(run.val_rows),
        steps=steps,
        mean_cosine=mean_cosine,
        unusable=selfmis.unusable_entry(run.pairs),
        world_size=run.ranks.world_size,
        amp=run.learner.amp,
    )


def resume(run: Training, last: dict) -> None:
    """Put a run that `prepare` has made anew back where last.pt left it."""
    if last["teacher_digest"] != run.teacher_digest:
        raise UsageError(f"--resume: --multi {run.config.multi} had other weights at the start")
    run.learner.restore(last, run.train_rows, run.val_rows)
    for name in PROGRESS:
        setattr(run, name, last[name])
    run.ranks.print(f"{run.out}: going on at epoch {run.epoch + 1}, step {run.step + 1}")


def train_one_epoch(run: Training) -> None:
    """The rest of an epoch: all of it, or what is left after a resume (Eq. (2) and (3))."""
    config, ranks = run.config, run.ranks
    batches = selfmis.epoch_batches(run.train_rows, config, run.epoch, ranks)
    steps = len(batches)
    batches = batches[run.step :]
    unread = []  # losses that are still on the device
    started = last_line = last_save = time.time()
    first_step = run.step
    for rows, (signals, targets) in zip(batches, run.pairs.batches(batches), strict=True):
        steps_done = run.epoch * steps + run.step
        for group in run.learner.optimizer.param_groups:
            group["lr"] = selfmis.cosine_lr(
                group["peak"], steps_done, config.epochs * steps, config.warmup
            )
        loss = run.step_loss(rows, signals, targets)
        run.learner.update(loss)
        run.step += 1
        unread.append((rows, loss.detach()))
        if run.step < steps and len(unread) < STEPS_PER_LOSS:  # not by the clock: ranks must agree
            continue
        run.losses += read_losses(run, unread)
        unread = []
        now = time.time()
        seconds_a_step = (now - started) / (run.step - first_step)
        run.records_per_second = config.batch_size * ranks.world_size / seconds_a_step
        if ranks.is_main and now - last_line > SECONDS_BETWEEN_LINES:
            last_line = now
            say_step(run, steps, seconds_a_step)
        if run.step < steps and now - last_save > config.save_seconds:
            last_save = now
            save_last(run)


def all_targets(targets: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, int]:
    """The teacher embeddings (W B, D) of all processes, and where this one's begin.

    They are constants, so no gradient is lost on the way.
    """
    if not ranks.is_joined:
        return targets, 0
    parts = [torch.empty_like(targets) for _ in range(ranks.world_size)]
    dist.all_gather(parts, targets)
    return torch.cat(parts), ranks.rank * len(targets)


def read_losses(run: Training, unread: list[tuple[np.ndarray, torch.Tensor]]) -> list[float]:
    """The losses of the last steps, averaged over processes.

    One that is not finite ends the run before anything is saved.
    """
    losses = torch.stack([loss for _, loss in unread])
    own = losses.clone()  # all_reduce writes over its argument
    if run.ranks.is_joined:
        dist.all_reduce(losses)
        losses /= run.ranks.world_size
    losses = losses.cpu()
    wrong = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
    if wrong:
        i = wrong[0]
        names = ""
        if not torch.isfinite(own[i]):  # it was this process
            records = run.pairs.dataset.records
            names = f" (records {', '.join(records.name(row) for row in unread[i][0][:3])} ...)"
        step = run.step - len(unread) + i + 1
        raise UsageError(
            f"the loss is {float(losses[i])} at epoch {run.epoch + 1}, step {step}{names}; what is "
            "saved is from before: start again with --overwrite and a lower --lr, a longer "
            "--warmup or --amp off"
        )
    return losses.tolist()


def say_step(run: Training, steps: int, seconds_a_step: float) -> None:
    """A line for people, and one for log.jsonl."""
    config = run.config
    loss = float(np.mean(run.losses[-STEPS_PER_LOSS:]))
    lr = run.learner.optimizer.param_groups[0]["lr"]
    text = f"epoch {run.epoch + 1}/{config.epochs} step {run.step:,}/{steps:,} | loss {loss:.4f}"
    if config.loss == "learnable":
        text += f" | scale {run.model.log_scale.exp().item():.2f} bias {run.model.bias.item():.2f}"
    minutes = seconds_a_step * ((config.epochs - run.epoch) * steps - run.step) / 60
    text += f" | lr {lr:.1e} | {1000 * seconds_a_step:.0f} ms a step"
    run.ranks.print(f"{text} | {run.records_per_second:,.0f} ECG/s | eta {minutes:.1f} min")
    selfmis.append_log(run.out, dict(epoch=run.epoch + 1, step=run.step, loss=loss, lr=lr))


def gather_targets(pairs: Pairs, rows: np.ndarray, ranks: Ranks) -> torch.Tensor:
    """The teacher embeddings (N, D) of the validation records, on every process."""
    parts = [torch.empty(0, pairs.teacher.embedding_dim)]
    for _, targets in pairs.batches(ranks.share(rows)):
        parts.append(targets.cpu())
    return ranks.gather_rows(torch.cat(parts), len(rows))


@torch.no_grad()
def validate(run: Training) -> dict:
    """val_loss over whole batches of 128; r1, r5, r10 (percent) over all records (Table 5).

    The same numbers on all processes, whatever their number.
    """
    parts = [torch.empty(0, run.model.encoder.embedding_dim)]
    for signals, _ in run.pairs.batches(run.ranks.share(run.val_rows), with_targets=False):
        parts.append(selfmis.embed(run.model.encoder, signals, run.ranks.device))
    single = run.ranks.gather_rows(torch.cat(parts), len(run.val_rows))  # (N, D)
    losses = []
    for b in range(max(1, len(single) // VALIDATION_BATCH)):  # an incomplete last one is left out
        batch = slice(b * VALIDATION_BATCH, (b + 1) * VALIDATION_BATCH)
        s, m = single[batch].to(run.ranks.device), run.val_targets[batch].to(run.ranks.device)
        losses.append(run.model.loss(s, m).item())
    k = [n for n in (1, 5, 10) if n <= len(single)]
    recall = selfmis.retrieval(single, run.val_targets, k)
    return {"val_loss": float(np.mean(losses))} | {f"r{n}": recall[n] for n in k}


def finish_epoch(run: Training, metrics: dict) -> None:
    """Count the epoch, keep the encoder if it is the best, and say so."""
    train_loss = float(np.mean(run.losses))
    is_best = metrics["val_loss"] < run.best
    run.epoch += 1
    run.step = 0
    run.losses = []
    run.best = min(run.best, metrics["val_loss"])
    run.last_entry = dict(epoch=run.epoch, train_loss=train_loss, **metrics)
    run.last_entry["records_per_second"] = run.records_per_second
    if not run.ranks.is_main:
        return
    selfmis.append_log(run.out, run.last_entry)
    if is_best:
        content = selfmis.encoder_content(run.model.encoder, run.spec, run.training_data)
        content |= dict(kind=run.kind, metrics=run.last_entry, config=vars(run.config))
        selfmis.save(run.out / "best.pt", content | selfmis.environment())
    save_last(run)
    recall = " ".join(f"R@{n} {metrics[f'r{n}']:.2f} %" for n in (1, 5, 10) if f"r{n}" in metrics)
    losses = f"train loss {train_loss:.4f} | validation loss {metrics['val_loss']:.4f}"
    print(f"epoch {run.epoch}/{run.config.epochs} | {losses} | {recall}", flush=True)
    warn_of_plateau(run, metrics["val_loss"])


def save_last(run: Training) -> None:
    """Everything that --resume needs; the order of records is a function of (seed, epoch)."""
    if not run.ranks.is_main:
        return
    content = selfmis.encoder_content(run.model.encoder, run.spec, run.training_data)
    content |= {name: getattr(run, name) for name in PROGRESS}
    content |= dict(kind=run.kind, config=vars(run.config), world_size=run.ranks.world_size)
    content |= run.learner.state(run.train_rows, run.val_rows)
    content |= dict(teacher_digest=run.teacher_digest)
    selfmis.save(run.out / "last.pt", content | selfmis.environment())


def prior_plateau(batch: int) -> float:
    """Eq. (3) where every logit is the same best constant, log(1 / (batch - 1))."""
    if batch == 1:
        return 0.0
    return math.log(batch - 1) + batch * math.log(1 + 1 / (batch - 1))


def warn_of_plateau(run: Training, loss: float) -> None:
    """A run that stays at the plateau has learned nothing but how rare a match is."""
    plateau = prior_plateau(min(VALIDATION_BATCH, len(run.val_rows)))
    if run.config.loss == "softmax" or plateau == 0:
        return
    other = "another --loss" if run.config.loss == "learnable" else "--loss learnable"
    remedy = f"if it stays: {other}, --warmup, another --lr"
    if loss > 1.5 * plateau:
        print(f"warning: the best constant logit gives {plateau:.2f}; {remedy}", flush=True)
    elif abs(loss / plateau - 1) < 0.03:
        text = f"the best constant logit gives {plateau:.2f} too, so only the prior is learned yet"
        print(f"warning: {text}; {remedy}", flush=True)


def next_command(run: Training) -> str:
    """That probes this run's encoder, as somebody would type it."""
    config = run.config
    labelled = [c.root for c in run.pairs.dataset.records.collections if c.kind == "ptb-xl"]
    command = f"python train_probe.py --encoder {run.out / 'best.pt'}"
    if labelled:  # the same folds, or the probe would test on records seen here
        command += f" --data {labelled[0]}"
        for name in ("val_fold", "test_fold"):
            if getattr(config, name) != getattr(PretrainConfig, name):
                command += f" {selfmis.as_flag(name)} {getattr(config, name)}"
    elif not all(c.kind == "synthetic" for c in run.pairs.dataset.records.collections):
        command += " --data YOUR_PTB_XL_FOLDER"
    return command


def say_what_next(run: Training) -> None:
    chance = 100 / len(run.val_rows)
    run.ranks.print(f"best validation loss {run.best:.4f}; chance R@1 is {chance:.2f} %")
    run.ranks.print(f"next: {next_command(run)}")


if __name__ == "__main__":
    selfmis.run_script(main, PretrainConfig, __doc__)
