"""siglip_loss is Eq. (3) of the paper, gradients included, on one process and on several;
softmax_loss is InfoNCE.
"""

import math
import os
import time

import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401  DDP needs it: imported once here, not in every process
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from selfmis import LOSSES, ResNet1D, SelfMIS, UsageError, siglip_loss, softmax_loss

BOTH = pytest.mark.parametrize("loss", [siglip_loss, softmax_loss])


def embeddings(B=5, N=None):
    generator = torch.Generator().manual_seed(0)
    single = 2 * torch.randn(B, 7, generator=generator, dtype=torch.float64)
    multi = 2 * torch.randn(N or B, 7, generator=generator, dtype=torch.float64)
    return single.requires_grad_(), multi


def softplus(x):
    return math.log1p(math.exp(x))


def looped_loss(single, multi, scale, bias, normalize=True, offset=0):
    """Eq. (3), one pair at a time, in Python numbers; bias is minus the b printed there."""
    total = 0.0
    for i, s in enumerate(single.tolist()):
        for j, m in enumerate(multi.tolist()):
            product = sum(a * b for a, b in zip(s, m, strict=True))
            if normalize:
                product /= math.hypot(*s) * math.hypot(*m)
            sign = 1 if j == offset + i else -1
            total += softplus(-sign * (scale * product + bias))
    return total / len(single)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


# ---- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [1, 2, 128])
def test_all_logits_zero_cost_ln_2_a_column(B):
    """The row sum of Eq. (3): a mean over all B x B pairs would be ln 2 for every B."""
    assert siglip_loss(*embeddings(B), scale=0.0).item() == pytest.approx(
        B * math.log(2), rel=1e-12
    )


def test_two_pairs_by_hand():
    """Products 3, 4 / -2, 1 times 0.5, plus 0.25: rows are the single-lead records."""
    single = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    multi = torch.tensor([[3.0, -2.0], [4.0, 1.0]], dtype=torch.float64)
    expected = (softplus(-1.75) + softplus(2.25) + softplus(-0.75) + softplus(-0.75)) / 2
    loss = siglip_loss(single, multi, scale=0.5, bias=0.25, normalize=False)
    assert loss.item() == pytest.approx(expected, rel=1e-12) and loss.shape == ()


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "raw"])
@pytest.mark.parametrize("scale, bias", [(1.7, -0.6), (1.7, 0.0), (0.0, 3.0), (-0.5, -10.0)])
@pytest.mark.parametrize("B, N, offset", [(5, 5, 0), (1, 4, 3), (3, 8, 0), (3, 8, 2), (3, 8, 5)])
def test_equals_the_double_loop(B, N, offset, scale, bias, normalize):
    single, multi = embeddings(B, N)
    options = dict(scale=scale, bias=bias, normalize=normalize, offset=offset)
    assert siglip_loss(single, multi, **options).item() == pytest.approx(
        looped_loss(single, multi, **options), rel=1e-12
    )


def test_defaults_are_the_papers():
    """Normalised, divided by 0.07, no bias, partners in the same row."""
    single, multi = embeddings()
    assert siglip_loss(single, multi).item() == pytest.approx(
        looped_loss(single, multi, 1 / 0.07, 0.0), rel=1e-12
    )


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "raw"])
def test_gradients_of_single_scale_and_bias_are_finite_differences(normalize):
    single, multi = embeddings(3, 5)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.3, -0.4))
    assert torch.autograd.gradcheck(
        lambda s, t, b: siglip_loss(s, multi, scale=t, bias=b, normalize=normalize, offset=1),
        (single, scale, bias),
    )


@BOTH
def test_multi_lead_side_gets_no_gradient(loss):
    single, multi = embeddings()
    loss(single, multi.requires_grad_()).backward()
    assert single.grad.abs().sum() > 0 and multi.grad is None


# ---- what changes nothing ------------------------------------------------------------------------


@BOTH
def test_length_of_an_embedding_changes_nothing(loss):
    single, multi = embeddings()
    lengths = torch.tensor([0.01, 1.0, 3.0, 50.0, 1000.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        loss(single * lengths, multi * lengths.flip(0)), loss(single, multi), rtol=1e-10, atol=0
    )


@BOTH
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_mean_over_shards_is_the_whole(loss, shards):
    """Each shard scores its rows against all columns, as a process does; so does its gradient."""
    single, multi = embeddings(8)
    whole, B = loss(single, multi), 8 // shards
    parts = torch.stack([loss(single[k : k + B], multi, offset=k) for k in range(0, 8, B)]).mean()
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients(parts, single), gradients(whole, single), rtol=1e-10, atol=1e-14
    )


# ---- what must change it -------------------------------------------------------------------------


@BOTH
def test_closer_partner_lowers_and_closer_stranger_raises_the_loss(loss):
    single, multi = (F.normalize(x.detach()) for x in embeddings())
    for i in range(5):
        for j in range(5):
            closer = multi.clone()
            closer[j] = multi[j] + 0.1 * (
                single[i] - multi[j] * (single[i] @ multi[j])
            )  # turn column j towards row i
            change = loss(single[[i]], closer, offset=i) - loss(single[[i]], multi, offset=i)
            assert change < 0 if i == j else change > 0


# ---- numbers of every size and kind --------------------------------------------------------------


@pytest.mark.parametrize("partner", [1e4, -1e4])
@pytest.mark.parametrize("normalize", [True, False], ids=["cosine", "raw"])
def test_finite_at_extreme_logits(partner, normalize):
    """Partner's logit +-1e4, stranger's the opposite: the loss is 0 or the two misses."""
    single = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = siglip_loss(single, single.detach(), scale=partner, normalize=normalize)
    assert loss.item() == pytest.approx(0 if partner > 0 else 2e4)
    assert torch.isfinite(gradients(loss, single)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, dict(scale=10.0, bias=-10.0), dict(scale=0.07, normalize=False)],
    ids=["paper", "learnable", "raw"],
)
def test_half_precision_inputs_are_computed_in_float32(dtype, options):
    single, multi = (x.detach().to(dtype) for x in embeddings(16))
    loss, expected = (
        siglip_loss(single, multi, **options),
        siglip_loss(single.float(), multi.float(), **options),
    )
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_half_precision_products_do_not_overflow():
    """300 x 300 is beyond float16."""
    value = torch.tensor([[300.0]], dtype=torch.float16)
    assert siglip_loss(value, value, scale=-1.0, normalize=False).item() == pytest.approx(90000)


def test_half_precision_inputs_get_half_precision_gradients():
    single, multi = embeddings()
    single = single.detach().to(torch.bfloat16).requires_grad_()
    [gradient] = gradients(siglip_loss(single, multi.to(torch.bfloat16)), single)
    assert gradient.dtype == torch.bfloat16 and gradient.abs().max() > 0


def test_half_precision_teacher_beside_a_float32_student():
    """The cache of teacher embeddings is float16."""
    single, multi = embeddings()
    single, multi = single.float(), multi.half()
    torch.testing.assert_close(
        siglip_loss(single, multi), siglip_loss(single, multi.float()), rtol=0, atol=0
    )


@BOTH
def test_autocast_does_not_lower_the_precision(loss):
    single, multi = (x.float() for x in embeddings(16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(single, multi)
    torch.testing.assert_close(inside, loss(single, multi), rtol=0, atol=0)


def test_double_stays_double():
    single, multi = embeddings()
    assert siglip_loss(single, multi).dtype == torch.float64
    assert siglip_loss(single.float(), multi.float()).dtype == torch.float32


# ---- the softmax form ----------------------------------------------------------------------------


@pytest.mark.parametrize("B, N, offset, options", [(5, 5, 0, {}), (3, 8, 4, dict(scale=3.0))])
def test_softmax_loss_is_torchs_cross_entropy_of_scaled_cosines(B, N, offset, options):
    single, multi = embeddings(B, N)
    cosines = F.cosine_similarity(single[:, None], multi[None], dim=2)
    expected = F.cross_entropy(options.get("scale", 1 / 0.07) * cosines, torch.arange(B) + offset)
    loss = softmax_loss(single, multi, offset=offset, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients(loss, single), gradients(expected, single), rtol=1e-10, atol=1e-14
    )


# ---- the losses by name --------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_each_named_loss_has_its_scale_bias_and_partners(name, offset):
    single, multi = embeddings(3, 8)
    if name == "softmax":
        cosines = F.cosine_similarity(single[:, None], multi[None], dim=2)
        expected = F.cross_entropy(cosines / 0.07, torch.arange(3) + offset).item()
    else:
        settings = {
            "paper": (1 / 0.07, 0.0, True),
            "learnable": (10.0, -10.0, True),
            "raw": (0.07, 0.0, False),
        }
        expected = looped_loss(single, multi, *settings[name], offset)
    loss = SelfMIS(torch.nn.Identity(), name).loss(single, multi, offset)
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # t of "learnable" is a float32


# ---- shapes --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "single, multi, offset, named",
    [
        ((5, 7), (5, 6), 0, "6"),  # other widths
        ((5, 7), (4, 7), 0, "4"),  # a row without its column
        ((5, 7), (8, 7), 4, "4"),  # the last partner would be column 8 of 8
        ((5, 7), (8, 7), -1, "-1"),
        ((7,), (5, 7), 0, "7"),
        ((5, 7), (7,), 0, "7"),
        ((2, 5, 7), (2, 5, 7), 0, "2, 5, 7"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(loss, single, multi, offset, named):
    with pytest.raises(UsageError, match=named):
        loss(torch.ones(single), torch.ones(multi), offset=offset)


@BOTH
@pytest.mark.parametrize("side", ["single", "multi"])
@pytest.mark.parametrize("kind, named", [(np.asarray, "ndarray"), (list, "list")])
def test_embeddings_that_are_no_tensors_are_refused_by_their_type(loss, side, kind, named):
    embeddings = dict(single=torch.ones(5, 7), multi=torch.ones(5, 7))
    embeddings[side] = kind(embeddings[side])
    with pytest.raises(UsageError, match=f"{named}.*tensor"):
        loss(**embeddings)


@BOTH
def test_no_embeddings_are_refused(loss):
    with pytest.raises(UsageError, match="0, 7"):
        loss(torch.ones(0, 7), torch.ones(0, 7))


# ---- several processes ---------------------------------------------------------------------------


class Alignment(torch.nn.Module):
    """A small student with learnable scale and bias, and the loss inside, for one wrapper."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = ResNet1D(1, stem=8, widths=(8, 16), depths=(2, 1), group_width=4)
        self.log_scale = torch.nn.Parameter(torch.tensor(10.0).log())
        self.bias = torch.nn.Parameter(torch.tensor(-1.0))
        self.double()

    def forward(self, x, multi, offset):
        return siglip_loss(
            self.encoder(x), multi, scale=self.log_scale.exp(), bias=self.bias, offset=offset
        )


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 1, 65, generator=generator, dtype=torch.float64)  # (B, lead, T)
    multi = torch.randn(8, 16, generator=generator, dtype=torch.float64)  # (B, D) of the teacher
    return x, multi


def rank_main(rank, ranks, folder):
    """One process: its own rows of the batch against the gathered columns, under DDP."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    model = DistributedDataParallel(Alignment())
    (x, multi), B = batch(), 8 // ranks
    own, columns = (
        slice(rank * B, (rank + 1) * B),
        [torch.empty(B, 16, dtype=torch.float64) for _ in range(ranks)],
    )
    dist.all_gather(columns, multi[own].contiguous())
    loss = model(x[own], torch.cat(columns), rank * B)
    loss.backward()
    torch.save((loss.detach(), [p.grad for p in model.parameters()]), f"{folder}/{rank}.pt")
    os._exit(
        0
    )  # not through Python's end, where a thread of gloo may still live and abort the process


@pytest.mark.parametrize("ranks", [4])
def test_several_processes_give_the_gradients_of_one(ranks, tmp_path):
    """Loss and every gradient, scale's and bias's too, on every rank to 1e-10; hanging fails."""
    context = torch.multiprocessing.start_processes(
        rank_main, (ranks, str(tmp_path)), nprocs=ranks, join=False, start_method="fork"
    )  # forked, since importing torch anew takes each of them seconds
    deadline = time.monotonic() + 120
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("processes hang")
    model = Alignment()
    loss = model(*batch(), 0)
    expected = gradients(loss, *model.parameters())
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    torch.testing.assert_close(
        torch.stack([loss for loss, _ in found]).mean(), loss.detach(), rtol=1e-10, atol=0
    )
    for _, grads in found:
        torch.testing.assert_close(tuple(grads), expected, rtol=1e-10, atol=1e-12)


def test_a_cosine_times_0_07_cannot_come_near_the_published_loss():
    """The README's 84.3: a perfect row of 128, its own record at cosine 1, all strangers at -1."""
    strangers = -torch.ones(127, 1)
    row = torch.cat([torch.ones(1, 1), strangers])  # (128, 1)
    assert float(siglip_loss(torch.ones(1, 1), row, scale=0.07)) == pytest.approx(84.3, abs=0.05)
