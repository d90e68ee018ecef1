"""Contrastive losses with the embeddings of all processes, and the loss of statements."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

TEMPERATURE = 0.1  # in all methods


class Gather(torch.autograd.Function):
    """`gather`, whose gradient is summed over processes and cut to this one's rows."""

    @staticmethod
    def forward(ctx, z: torch.Tensor) -> torch.Tensor:
        z = z.contiguous()
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # A copy, because all_reduce writes over its argument.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(z: torch.Tensor) -> torch.Tensor:
    """(B, D) of this process -> (W B, D) of all, in the order of ranks, with their gradients.

    Each process computes the loss of the whole batch.  What a process gets back for its own rows is
    the sum over processes, W times the gradient, and DistributedDataParallel's mean over processes
    makes it that of one process with the whole batch.
    """
    if not dist.is_initialized():
        return z
    return Gather.apply(z)


def similarities(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosines over the temperature, (..., N, D), (..., M, D) -> (..., N, M), at least float32."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.to(dtype), dim=-1), F.normalize(b.to(dtype), dim=-1)
        return a @ b.mT / TEMPERATURE


def info_nce(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row i of a and row i of b belong together: cross-entropy by rows and by columns, halved.

    a, b: (N, D).
    """
    logits = similarities(a, b)  # (N, N)
    partners = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, partners) + F.cross_entropy(logits.T, partners)) / 2


def nt_xent(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same among all 2N views: each looks for its partner among the 2N - 1 others.

    a, b: (N, D).
    """
    z = torch.cat([a, b])  # (2N, D)
    logits = similarities(z, z)
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    partners = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(logits, partners)


def patient_nt_xent(z: torch.Tensor, patients: torch.Tensor) -> torch.Tensor:
    """3KG's: all views of one patient belong together; the mean over ordered pairs of them.

    Each pair competes with the views of other patients only.  z: (N, D); patients: (N,).
    """
    logits = similarities(z, z)  # (N, N)
    is_same = patients[:, None] == patients[None, :]
    others = logits.masked_fill(is_same, -torch.inf).logsumexp(1, keepdim=True)  # (N, 1)
    losses = F.softplus(others - logits)  # -log of e^own / (e^own + sum of others)
    is_pair = is_same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return torch.where(is_pair, losses, 0).sum() / is_pair.sum()


def statement_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy: its sum over statements, its mean over records that have any statement.

    logits, labels: (B, 44).  A mean over statements would have gradients as small as AdamW's eps.
    """
    errors = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").sum(1)
    is_labelled = labels.any(1)  # (B,)
    return (errors * is_labelled).sum() / is_labelled.sum().clamp_min(1)
