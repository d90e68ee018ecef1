"""What several baselines share: losses against closed forms, layers and network against torch's."""

import copy
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import run_forked
from torch.nn.parallel import DistributedDataParallel

from extras.baselines.losses import gather, info_nce, nt_xent, patient_nt_xent
from extras.baselines.transformer import CONV_SIZES, ConvTransformer, Layer, halves


def normal(*shape, seed=0):
    """Float64, so that a test sees the mathematics."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def patient_loss(a, b):
    """3KG's with two views of each patient."""
    patients = torch.arange(len(a))
    return patient_nt_xent(torch.cat([a, b]), torch.cat([patients, patients]))


LOSSES = [info_nce, nt_xent, patient_loss]
assert_close = torch.testing.assert_close

# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


def test_two_orthogonal_pairs():
    pairs = torch.eye(2, dtype=torch.float64)
    assert nt_xent(pairs, pairs).item() == pytest.approx(9.0796e-5, abs=5e-10)
    assert patient_loss(pairs, pairs).item() == pytest.approx(9.0796e-5, abs=5e-10)
    assert info_nce(pairs, pairs).item() == pytest.approx(4.5399e-5, abs=5e-10)


@pytest.mark.parametrize("loss, others", [(info_nce, 5), (nt_xent, 9), (patient_loss, 9)])
def test_views_that_all_coincide_are_guessed(loss, others):
    same = torch.ones(5, 3, dtype=torch.float64)
    assert loss(same, same).item() == pytest.approx(math.log(others), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_ignores_rotation_scale_and_order(loss):
    a, b = normal(6, 4), normal(6, 4, seed=1)
    expected = loss(a, b)
    turn, _ = torch.linalg.qr(normal(4, 4, seed=2))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    scale = normal(6, 1, seed=4).exp()
    for views in ((a @ turn, b @ turn), (a[order], b[order]), (a * scale, b / scale), (b, a)):
        assert_close(loss(*views), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_along_an_embedding(loss):
    """A norm that is detached would leave one."""
    a, b = normal(6, 4).requires_grad_(), normal(6, 4, seed=1).requires_grad_()
    loss(a, b).backward()
    for z in (a, b):
        assert (z * z.grad).sum(1).abs().max() < 1e-12
        assert z.grad.abs().max() > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_float32_whatever_autocast_says(loss):
    a, b = normal(6, 4).float(), normal(6, 4, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(a, b)
    assert_close(found, loss(a, b), rtol=0, atol=0)
    assert loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_3kg_with_a_patient_a_record_is_nt_xent():
    a, b = normal(4, 3), normal(4, 3, seed=1)
    assert_close(patient_loss(a, b), nt_xent(a, b), rtol=1e-12, atol=0)


def test_3kg_is_a_loop_over_ordered_pairs_of_one_patient():
    z, patients = normal(7, 4), torch.tensor([3, 1, 3, 2, 1, 3, 5])
    unit = z / z.norm(dim=1, keepdim=True)
    s = (unit @ unit.T / 0.1).exp()
    losses = []
    for i in range(7):
        others = sum(s[i, n] for n in range(7) if patients[n] != patients[i])
        for p in range(7):
            if p != i and patients[p] == patients[i]:
                losses.append(-torch.log(s[i, p] / (s[i, p] + others)))
    assert len(losses) == 8
    assert_close(patient_nt_xent(z, patients), torch.stack(losses).mean())


def linear():
    torch.manual_seed(0)
    return nn.Linear(5, 4).double()


def save_gradients(folder):
    """Of each loss, by one process of several; and what it gathered."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x = normal(2, 8, 5)[:, rank * 4 : rank * 4 + 4]  # (views, B, features)
    gradients = []
    for loss in LOSSES:
        model = DistributedDataParallel(linear())
        a, b = (gather(z) for z in model(x))
        loss(a, b).backward()
        gradients.append([p.grad for p in model.parameters()])
    patients = gather(torch.tensor([rank, 7]))
    content = dict(gradients=gradients, gathered=a.detach(), patients=patients)
    torch.save(content, folder / f"{rank}.pt")
    os.sync()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What save_gradients left, by rank."""
    folder = Path(tmp_path_factory.mktemp("gradients"))
    assert run_forked(2, save_gradients, folder) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("i", range(3), ids=["info_nce", "nt_xent", "3kg"])
def test_two_processes_give_the_gradients_of_one(two_processes, i):
    model = linear()
    LOSSES[i](*model(normal(2, 8, 5))).backward()
    expected = [p.grad for p in model.parameters()]
    assert expected[0].abs().max() > 1e-3
    for process in two_processes:
        assert_close(process["gradients"][i], expected, rtol=1e-10, atol=0)


def test_gathered_rows_are_in_the_order_of_ranks(two_processes):
    with torch.no_grad():
        expected = linear()(normal(2, 8, 5)[0])
    for process in two_processes:
        assert_close(process["gathered"], expected, rtol=1e-12, atol=1e-14)
        assert process["patients"].tolist() == [0, 7, 1, 7]


def test_one_process_gathers_nothing():
    z = normal(3, 2)
    assert gather(z) is z


# --------------------------------------------------------------------------------------------------
# Layer
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_is_torchs(pre_norm, masked):
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=pre_norm
    ).double()
    for p in theirs.parameters():
        nn.init.normal_(p)  # else a bias of 0 or a gain of 1 may stand in the wrong place
    ours = Layer(12, 3, 20, pre_norm=pre_norm, dropout=0.0).double()
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj": "out"}
    names |= {"linear1": "widen", "linear2": "narrow"}
    state = {}
    for key, value in theirs.state_dict().items():
        for name, our_name in names.items():
            key = key.replace(name, our_name)
        state[key] = value
    ours.load_state_dict(state)

    x, is_real = normal(2, 7, 12), torch.ones(2, 7, dtype=torch.bool)
    if masked:
        is_real[0, 4:] = False
        found, expected = ours(x, is_real), theirs(x, src_key_padding_mask=~is_real)
    else:
        found, expected = ours(x), theirs(x)
    assert_close(found[is_real], expected[is_real], rtol=1e-12, atol=1e-13)


def test_nobody_attends_to_padding():
    torch.manual_seed(0)
    layer = Layer(12, 3, 20, dropout=0.0).double()
    x, is_real = normal(2, 7, 12), torch.arange(7).expand(2, 7) < 5
    other = torch.where(is_real[..., None], x, 100 * normal(2, 7, 12, seed=1))
    assert_close(layer(other, is_real)[is_real], layer(x, is_real)[is_real])
    assert not torch.allclose(layer(other)[is_real], layer(x)[is_real])
    assert_close(layer(x, is_real)[:, :5], layer(x[:, :5]))


def test_heads_may_be_wider_than_the_tokens_and_have_no_bias():
    layer = Layer(12, 2, 20, head_dim=8, qkv_bias=False)
    assert layer(torch.zeros(3, 5, 12)).shape == (3, 5, 12)
    # q, k, v; out; feed-forward; two norms
    expected = 12 * 48 + (16 * 12 + 12) + (12 * 20 + 20 + 20 * 12 + 12) + 2 * 24
    assert sum(p.numel() for p in layer.parameters()) == expected


# --------------------------------------------------------------------------------------------------
# Conv-transformer
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, count", [("published", 90_373_248), ("small", 3_757_088)])
def test_parameters_of_the_conv_transformer(size, count):
    with torch.device("meta"):
        network = ConvTransformer(12, **CONV_SIZES[size])
    assert sum(p.numel() for p in network.parameters()) == count
    if size == "published":
        assert sum(p.numel() for p in network.layers[0].parameters()) == 7_087_872


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ConvTransformer(1, **CONV_SIZES["small"] | dict(layers=1)).eval()


@torch.no_grad()
def test_a_token_for_16_samples_of_five_seconds():
    published = CONV_SIZES["published"] | dict(width=64, layers=1, heads=4, feed_forward=64)
    assert ConvTransformer(2, **published).tokens(torch.randn(2, 2, 2500)).shape == (2, 156, 64)
    small = ConvTransformer(2, **CONV_SIZES["small"] | dict(layers=1))
    assert small.tokens(torch.randn(2, 2, 500)).shape == (2, 31, 256)
    assert small(torch.randn(3, 2, 1000)).shape == (3, 256)


@torch.no_grad()
def test_one_half_ignores_the_other_and_the_record_is_their_mean(network):
    x = normal(3, 1, 1000).float()
    other = torch.cat([x[..., :500], normal(3, 1, 500, seed=1).float()], -1)
    first, second = network.embed_segment(torch.cat(halves(x))).chunk(2)
    assert torch.equal(network.embed_segment(torch.cat(halves(other)))[:3], first)
    assert_close(first, network.tokens(x[..., :500]).mean(1))
    assert_close(second, network.tokens(x[..., 500:]).mean(1))
    assert_close(network(x), (first + second) / 2)
    assert not torch.allclose(first, second)
    head = nn.Linear(256, 4)
    assert_close(head(network(x)), (head(first) + head(second)) / 2)


@torch.no_grad()
def test_the_network_is_its_parts(network):
    """So that a mask fits between `project` and `contextualise`."""
    x = normal(2, 1, 500).float()
    latents = network.latents(x)
    assert latents.shape == (2, 31, 256)
    projected = network.project(network.latent_norm(latents))
    assert torch.equal(network.contextualise(projected), network.tokens(x))
    assert_close(network.contextualise(projected)[:1], network.contextualise(projected[:1]))
    masked = projected.clone()
    masked[:, 3] = 0
    assert not torch.allclose(network.contextualise(masked), network.tokens(x))


@torch.no_grad()
def test_places_are_a_convolution_over_time_without_its_last_output():
    network = ConvTransformer(1, **CONV_SIZES["small"] | dict(layers=0)).double().eval()
    g, v = network.position.parametrizations.weight.parameters()
    assert g.shape == (1, 1, 32) and v.shape == (256, 16, 32)
    assert float(v.std()) == pytest.approx((4 / (32 * 256)) ** 0.5, rel=0.02)
    g.copy_(normal(1, 1, 32))
    weight = g * v / v.norm(dim=(0, 1), keepdim=True)  # a norm at each place of the kernel
    tokens = normal(2, 31, 256)
    padded = F.pad(tokens.transpose(1, 2), (16, 15))
    places = F.conv1d(padded, weight, network.position.bias, groups=16)  # (B, D, N)
    expected = F.layer_norm(tokens + F.gelu(places).transpose(1, 2), (256,))
    assert_close(network.contextualise(tokens), expected)


def test_the_convolutions_learn_at_a_tenth_and_nothing_else_does(network):
    network = copy.deepcopy(network).double()
    x, weight = normal(3, 1, 500), normal(256)
    (network.latent_norm(network.latents(x)) @ weight).square().mean().backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    plain = x  # the same without a hook
    network.zero_grad()
    for i, conv in enumerate(network.convs):
        plain = conv(plain)
        if i == 0:
            plain = network.conv_norm(plain)
        plain = F.gelu(plain)
    (network.latent_norm(plain.transpose(1, 2)) @ weight).square().mean().backward()
    for name, gradient in found.items():
        factor = 1.0 if name.startswith("latent_norm") else 0.1
        assert_close(gradient, factor * network.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
    assert len(found) == 8  # four convolutions, two norms
    assert all(conv.weight.grad.abs().max() > 1e-4 for conv in network.convs)


@torch.no_grad()
def test_dropout_is_off_in_eval_mode_only(network):
    x = normal(3, 1, 1000).float()
    assert torch.equal(network(x), network(x))
    assert_close(network(x)[:1], network(x[:1]))
    network.train()
    assert not torch.equal(network(x), network(x))
    network.eval()


def test_the_architecture_rebuilds_the_network(network):
    again = ConvTransformer(**network.architecture)
    again.load_state_dict(network.state_dict())
    x = normal(1, 1, 1000).float()
    assert torch.equal(again.eval()(x), network(x))
    assert (again.leads, again.embedding_dim) == (1, 256)
