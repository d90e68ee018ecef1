"""Alignment pre-training of SelfMIS: lead I learns to embed like all twelve leads (paper, sections 2 and 3.2, Table 7).

    torchrun --nproc_per_node 4 train_pretrain.py                          # no data: synthetic ECG, minutes on a laptop
    torchrun --nproc_per_node 4 train_pretrain.py --data mimic-iv-ecg --out runs/a \\
        --single 1_lead_ECGFounder.pth --multi 12_lead_ECGFounder.pth      # the paper; add --resume to go on after a stop

Writes OUT/best.pt (the encoder of the lowest validation loss), OUT/last.pt, OUT/log.jsonl and OUT/config.json.
"""

import dataclasses
import math
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import selfmis
from selfmis import Config, Pairs, Ranks, Records, ResNet1D, SelfMIS, View, flag


@dataclasses.dataclass
class PretrainConfig(Config):
    """Flags of train_pretrain.py."""

    out: str = flag("runs/pretrain", "folder of the run", metavar="DIR")
    batch_size: int = flag(128, "records in a batch of one process; the loss compares the records of all processes", type=int)
    lr: float = flag(1e-4, "peak learning rate, cosine to 0", type=float)
    single: str = flag("random", "the encoder to train: an ECGFounder file, a checkpoint of ours, or random", metavar="PATH|random")
    multi: str | None = flag(None, "the frozen 12-lead teacher: an ECGFounder file, a checkpoint of ours, or random", metavar="PATH|random")
    loss: str = flag("paper", "Eq. (3) with fixed or learnable t and b, on the raw product, or InfoNCE", choices=selfmis.LOSSES)
    local_negatives: bool = flag(False, "compare the records of one process only")
    weight_decay: float = flag(0.1, "of AdamW", type=float)
    warmup: int = flag(0, "steps of linear warm-up before the cosine", type=int)
    val_records: int = flag(5000, "the last N records of a collection without folds validate", type=int)
    save_seconds: float = flag(600.0, "time between two saves of last.pt within an epoch", type=float)


# Table 7 is made for 800,035 records and four GPUs.  Without data a laptop shall show the method in two or three minutes: 126 steps,
# after which Eq. (3) with a random teacher would still be on its plateau, so InfoNCE it is.
DEMO = dict(data=["synthetic:3000"], size="small", sample_rate=100, epochs=7, lr=1e-3, warmup=20, loss="softmax", multi="random")
LOSSES_AT_ONCE = 20  # steps between two looks at the loss, which make the device wait
VALIDATION_BATCH = 128  # the loss of a row grows with the batch; the paper's 128 keeps runs comparable
SYNTHETIC_STREAM = 1  # seed of the synthetic records here; train_probe.py draws others


def main(config: PretrainConfig) -> dict:
    """Train; returns the last epoch's line of log.jsonl (in the first process)."""
    ranks = selfmis.join_ranks(config.device, config.seed)
    if not config.data:
        own = config.single != "random" or config.multi not in (None, "random")  # an encoder that has a size and a rate
        demo = {k: v for k, v in DEMO.items() if not (own and k in ("size", "sample_rate"))}
        config = selfmis.demo_settings(config, demo | dict(batch_size=max(1, 128 // ranks.world)), ranks)
    single, teacher, view = open_encoders(config)
    all_records = selfmis.gather_records(config, view.sample_rate_hz, SYNTHETIC_STREAM)
    train, val = split(all_records, config, ranks)
    out = selfmis.open_run(config, ranks)
    last = selfmis.read_last(config, out, ranks)
    if last and last["epoch"] == config.epochs:
        ranks.print(f"{out}: finished already, {config.epochs} epochs, best validation loss {last['best']:.4f}")
        return last["entry"]

    teacher.to(ranks.device)
    train, val = (selfmis.read_pairs(config, records, view, ranks, what, teacher) for records, what in ((train, "training"), (val, "validation")))
    seen = teacher.seen + single.seen + selfmis.data_used(train.dataset.records[train.usable], val.dataset.records[val.usable], labels=False)
    B, W = config.batch_size, ranks.world
    steps = len(selfmis.epoch_batches(train.usable, config, 0, ranks))  # of one epoch
    resident = train.make_resident()
    precision, scaler, amp = selfmis.autocast(ranks.device, config.amp)
    model = SelfMIS(single, config.loss).to(ranks.device)
    optimizer = make_optimizer(model, config)
    progress = dict(epoch=0, step=0, losses=[], best=math.inf, entry={}, records=len(train.usable))
    if last:
        if last["records"] != len(train.usable):
            raise ValueError(f"--resume: {len(train.usable):,} training records can be read, but {last['records']:,} when {out} was started")
        selfmis.restore(last, model, optimizer, scaler, amp, out)
        progress = {name: last[name] for name in progress}
        ranks.print(f"{out}: going on at epoch {progress['epoch'] + 1}, step {progress['step'] + 1}")
    if config.resume and ranks.first:
        selfmis.rewind_log(out / "log.jsonl", progress["epoch"], progress["step"], progress["entry"])
    ddp = selfmis.distribute(model, config, ranks)

    def save_last() -> None:
        content = selfmis.encoder_content(model.encoder, view, seen) | progress
        content |= dict(kind="pretrain", model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        selfmis.save(out / "last.pt", content | dict(world=W, amp=amp, config=dataclasses.asdict(config)))

    validator = Validator(val, config, ranks)
    ranks.print(
        f"training {sum(p.numel() for p in model.parameters()):,} parameters on lead {view.lead}, {view.sample_rate_hz:g} Hz, {view.preprocessing['normalize']}"
        f" (filter {view.preprocessing['filter']}) with {W} process(es) on {ranks.device.type}, amp {amp}{', all pairs in GPU memory' if resident else ''}\n"
        f"{len(train.usable):,} records, {steps:,} steps an epoch, {B if config.local_negatives else B * W} records in the loss of a step; {len(val.usable):,} validate\n"
        f"teacher: mean pairwise cosine {validator.cone:.2f}{' (without a bias Eq. (3) learns the rarity of a match by it: bad near 0, and near 1)' * (config.loss == 'paper')}"
    )
    if ranks.first and not last:
        counts = dict(training_records=len(train.usable), validation_records=len(val.usable), steps=steps, teacher_cone=validator.cone)
        counts |= dict(unusable=dict(training=train.unusable, validation=val.unusable), world=W, amp=amp)
        selfmis.write_json(out / "config.json", dict(config=dataclasses.asdict(config), view=view._asdict(), **counts, **selfmis.environment()))

    clock = Clock(config.epochs * steps - progress["epoch"] * steps - progress["step"], B * W)
    while progress["epoch"] < config.epochs:
        epoch = progress["epoch"]
        mine = selfmis.epoch_batches(train.usable, config, epoch, ranks)[progress["step"] :]
        unread = []  # losses still on the device: reading one waits for the step to end
        for rows, (signals, targets) in zip(mine, train.batches(mine)):
            for group in optimizer.param_groups:
                group["lr"] = selfmis.cosine_lr(group["peak"], epoch * steps + progress["step"], config.epochs * steps, config.warmup)
            multi, first = (targets, 0) if config.local_negatives else all_targets(targets, ranks)
            with precision():
                loss = ddp(signals, multi, first)  # Eq. (2) and (3)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress["step"] += 1
            unread.append((rows, loss.detach()))
            clock.tick()
            if progress["step"] == steps or len(unread) == LOSSES_AT_ONCE:  # never by the clock: processes have to agree
                progress["losses"] = progress["losses"] + read_losses(unread, train, progress, ranks)
                unread = []
                if ranks.first and clock.speak():
                    lr, recent = optimizer.param_groups[0]["lr"], np.mean(progress["losses"][-LOSSES_AT_ONCE:])
                    tb = f" | scale {model.log_scale.exp().item():.2f} bias {model.bias.item():.2f}" if config.loss == "learnable" else ""
                    at = f"epoch {epoch + 1}/{config.epochs} step {progress['step']:,}/{steps:,}"
                    print(f"{at} | loss {recent:.4f}{tb} | lr {lr:.1e} | {clock}", flush=True)
                    selfmis.append_json(out / "log.jsonl", epoch=epoch + 1, step=progress["step"], loss=progress["losses"][-1], lr=lr)
                if ranks.first and progress["step"] < steps and clock.since_save() > config.save_seconds:
                    save_last()
                    clock.saved()
        metrics = validator(model)
        entry = dict(epoch=epoch + 1, train_loss=float(np.mean(progress["losses"])), **metrics, records_per_second=clock.rate())
        improved = metrics.get("val_loss", math.inf) < progress["best"]
        progress |= dict(epoch=epoch + 1, step=0, losses=[], best=min(progress["best"], metrics.get("val_loss", math.inf)), entry=entry)
        if ranks.first:
            if improved:
                content = selfmis.encoder_content(model.encoder, view, seen)
                selfmis.save(out / "best.pt", content | dict(kind="pretrain", metrics=entry, config=dataclasses.asdict(config), **selfmis.environment()))
            save_last()
            clock.saved()
            selfmis.append_json(out / "log.jsonl", **entry)
            r_at_k = " ".join(f"R@{k} {metrics[f'r{k}']:.2f} %" for k in validator.k)
            losses = f"train loss {entry['train_loss']:.4f} | validation loss {metrics['val_loss']:.4f}"
            print(f"epoch {epoch + 1}/{config.epochs} | {losses} | {r_at_k}", flush=True)
            validator.warn(metrics["val_loss"])
    spent = selfmis.cost([model.encoder, teacher], view, ranks.device) | dict(records_per_second=clock.rate())
    ranks.print(f"cost: {selfmis.say_cost(spent)} trained; both encoders")
    chance = 100 / len(val.usable)
    labelled = [root for kind, root in all_records.sources if kind == "ptb-xl"]
    flags = "" if config.data == DEMO["data"] else f" --data {labelled[0] if labelled else 'ptb-xl'}"
    if labelled:  # the same folds, or the probe would test on records seen here
        folds = {name: getattr(config, name) for name in ("val_fold", "test_fold") if getattr(config, name) != getattr(PretrainConfig, name)}
        flags += "".join(f" --{name.replace('_', '-')} {fold}" for name, fold in folds.items())
    ranks.print(f"best validation loss {progress['best']:.4f}; chance R@1 is {chance:.2f} %\nnext: python train_probe.py --encoder {out / 'best.pt'}{flags}")
    return progress["entry"]


def open_encoders(config: PretrainConfig) -> tuple[ResNet1D, ResNet1D, View]:
    """f_s, the frozen f_m, and how their input is made."""
    if config.multi is None:
        raise ValueError(
            "--multi: alignment needs a 12-lead teacher: 12_lead_ECGFounder.pth (huggingface.co/PKUDigitalHealth/ECGFounder), "
            "or one of your own by train_probe.py --finetune --lead all (its best.pt), or the word random"
        )
    single, teacher = selfmis.open_encoder(config.single, 1, config.size), selfmis.open_encoder(config.multi, 12, config.size)
    opened = {spec: encoder for spec, encoder in ((config.single, single), (config.multi, teacher)) if encoder is not None}
    view = selfmis.resolve_view(config, {} if single is None else {config.single: single}, opened)
    if view.lead == "all":
        raise ValueError("--lead all: pre-training aligns one lead; name it")
    size = next((encoder.architecture for encoder in opened.values()), selfmis.SIZES[config.size or "ecgfounder"])
    single = single or ResNet1D(**{**size, "leads": 1})
    teacher = teacher or ResNet1D(**{**size, "leads": 12})
    if single.embedding_dim != teacher.embedding_dim:
        raise ValueError(f"--single embeds in {single.embedding_dim} dimensions, --multi in {teacher.embedding_dim}; they must agree")
    return single, teacher.eval().requires_grad_(False), view


def split(records: Records, config: PretrainConfig, ranks: Ranks) -> tuple[Records, Records]:
    """Training and validation records.  Folds where there are any (the test fold is not even read), else the last of each list."""
    train, val = [], []
    for s, (kind, root) in enumerate(records.sources):
        rows = np.flatnonzero(records.source == s)
        folds = records.folds[rows]
        if folds.any():
            train.append(rows[(folds != config.val_fold) & (folds != config.test_fold)])
            val.append(rows[folds == config.val_fold])
        else:
            last = min(config.val_records, max(1, len(rows) // 10))
            if last < config.val_records:
                ranks.print(f"{root}: a list of {len(rows):,} records, so the last {last:,} of them validate, not {config.val_records:,}")
            train.append(rows[:-last])
            val.append(rows[-last:])
    train, val = np.concatenate(train), np.concatenate(val)
    if not len(train) or not len(val):
        raise ValueError(f"{len(train):,} records to train and {len(val):,} to validate on: give more --data or a larger --limit")
    return records[train], records[val]


def make_optimizer(model: SelfMIS, config: PretrainConfig) -> torch.optim.Optimizer:
    """AdamW of Table 7; a learnable t and b get a rate of their own and no weight decay."""
    groups = [dict(params=list(model.encoder.parameters()), peak=config.lr, weight_decay=config.weight_decay)]
    if config.loss == "learnable":
        groups.append(dict(params=[model.log_scale, model.bias], peak=1e-2, weight_decay=0.0))
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8)


def all_targets(targets: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, int]:
    """The teacher embeddings of all processes, and where this one's begin.  They are constants: no gradient is lost."""
    if ranks.world == 1:
        return targets, 0
    parts = [torch.empty_like(targets) for _ in range(ranks.world)]
    dist.all_gather(parts, targets)
    return torch.cat(parts), ranks.rank * len(targets)


def read_losses(unread: list, pairs: Pairs, progress: dict, ranks: Ranks) -> list[float]:
    """The losses of the last steps, averaged over processes; one that is not finite ends the run before anything is saved."""
    losses = torch.stack([loss for _, loss in unread])
    mine = torch.isfinite(losses).cpu()
    if ranks.world > 1:
        dist.all_reduce(losses)
        losses /= ranks.world
    losses = losses.cpu()
    if not torch.isfinite(losses).all():
        bad = int((~torch.isfinite(losses)).nonzero()[0])
        step = progress["step"] - len(unread) + bad + 1
        rows = [] if mine[bad] else unread[bad][0]
        names = ", ".join(pairs.dataset.records.name(row) for row in rows[:3])
        raise FloatingPointError(
            f"the loss is {float(losses[bad])} at epoch {progress['epoch'] + 1}, step {step}"
            f"{f' (records {names} ...)' if names else ''}; last.pt is from before: start again with --overwrite and a lower --lr, a longer --warmup or --amp off"
        )
    return losses.tolist()


class Validator:
    """Loss over batches and retrieval over all validation records, every record once whatever the number of processes."""

    def __init__(self, val: Pairs, config: PretrainConfig, ranks: Ranks):
        self.pairs, self.loss, self.ranks = val, config.loss, ranks
        self.rows = val.usable[np.random.default_rng(0).permutation(len(val.usable))]  # MIMIC's list is sorted by patient
        self.k = [k for k in (1, 5, 10) if k <= len(self.rows)]
        self.targets = self.gather((targets for _, targets in val.batches(self.mine())), val.teacher.embedding_dim)
        unit = F.normalize(self.targets, dim=-1)
        self.cone = float(unit.mean(0) @ unit.mean(0))  # mean pairwise cosine

    def mine(self) -> list[np.ndarray]:
        rows = self.rows[self.ranks.rank :: self.ranks.world]
        return [rows[i : i + 256] for i in range(0, len(rows), 256)]

    def gather(self, parts, D: int) -> torch.Tensor:
        """All rows in order; this process may have none."""
        return self.ranks.gather_rows(torch.cat([torch.empty(0, D), *(part.cpu() for part in parts)]), len(self.rows))

    def __call__(self, model: SelfMIS) -> dict:
        """val_loss and r1, r5, r10 (percent), in the first process; elsewhere nothing."""
        model.eval()
        signals = (signals for signals, _ in self.pairs.batches(self.mine(), with_targets=False))
        single = self.gather((selfmis.embed(model.encoder, part, self.ranks.device) for part in signals), model.encoder.embedding_dim)
        model.train()
        if not self.ranks.first:
            return {}
        both = zip(self.whole_batches(single), self.whole_batches(self.targets))
        with torch.no_grad():
            losses = [model.compare(s.to(self.ranks.device), m.to(self.ranks.device)).item() for s, m in both]
        recall = selfmis.retrieval(single, self.targets, self.k)
        return dict(val_loss=float(np.mean(losses)), **{f"r{k}": recall[k] for k in self.k})

    def whole_batches(self, embeddings: torch.Tensor):
        """Without the incomplete last one, where there is another."""
        parts = embeddings.split(VALIDATION_BATCH)
        return [part for part in parts if len(part) == len(parts[0])]

    def warn(self, loss: float) -> None:
        plateau = selfmis.prior_plateau(min(VALIDATION_BATCH, len(self.rows)))
        if self.loss != "softmax" and plateau and abs(loss / plateau - 1) < 0.03:
            remedy = "if it stays: --loss learnable, --warmup, another --lr"
            print(f"warning: the best constant logit gives {plateau:.2f} too, so nothing but the prior is learned yet; {remedy}", flush=True)


class Clock:
    """Speed and time left; validation counts as time too."""

    def __init__(self, steps: int, records: int):
        self.steps, self.records, self.done = steps, records, 0
        self.start = self.spoke = self.save = time.time()

    def tick(self) -> None:
        self.done += 1

    def rate(self) -> float:
        """Records per second."""
        return self.done * self.records / max(1e-9, time.time() - self.start)

    def speak(self) -> bool:
        """True at most every five seconds."""
        if time.time() - self.spoke < 5:
            return False
        self.spoke = time.time()
        return True

    def since_save(self) -> float:
        return time.time() - self.save

    def saved(self) -> None:
        self.save = time.time()

    def __str__(self) -> str:
        step = (time.time() - self.start) / max(1, self.done)
        return f"{1000 * step:.0f} ms a step | {self.rate():,.0f} ECG/s | eta {step * (self.steps - self.done) / 60:.1f} min"


if __name__ == "__main__":
    selfmis.run_script(main, PretrainConfig, __doc__)
