"""Wav2Vec 2, W2V-CMSC and ST-MEM: masks, quantiser and losses against loops and closed forms."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import spy

from extras.baselines import st_mem, w2v_cmsc, wav2vec2
from extras.baselines.common import random_stream, random_segment, zscore
from extras.baselines.st_mem import STMEM, STMEMConfig, score_patches, time_code
from extras.baselines.transformer import Layer
from extras.baselines.w2v_cmsc import W2VCMSC, W2VCMSCConfig
from extras.baselines.wav2vec2 import Quantiser, Wav2Vec2, Wav2Vec2Config, contrast, mask_spans
from extras.synthetic import INDEPENDENT_ROWS
from selfmis import UsageError

assert_close = torch.testing.assert_close
CONFIGS = {Wav2Vec2: Wav2Vec2Config, W2VCMSC: W2VCMSCConfig, STMEM: STMEMConfig}
KINDS = pytest.mark.parametrize("kind", CONFIGS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=random_stream(seed))


def make_method(kind, device="cpu", **settings):
    torch.manual_seed(0)
    with torch.device(device):
        return kind(CONFIGS[kind](**dict(size="small") | settings)).eval()


@pytest.mark.parametrize("size", ["published", "small"])
@KINDS
def test_parameters(kind, size):
    counts = (88_501_985, 4_195_546) if kind is STMEM else (90_883_072, 3_847_840)
    method = make_method(kind, "meta", size=size)
    assert sum(p.numel() for p in method.parameters()) == counts[size == "small"]
    norms = {layer.pre_norm for layer in method.modules() if isinstance(layer, Layer)}
    assert norms == {kind is STMEM}


@KINDS
def test_every_parameter_learns_and_flat_pieces_stay_finite(kind):
    """A parameter without a gradient would stop training in several processes."""
    method, ecg = make_method(kind).train(), normal(4, 12, 1000)
    ecg[0, :, 200:700], ecg[1, 1], ecg[2] = 0.3, -0.2, 0
    loss, _ = method(ecg, None, random_stream(0))
    loss.backward()
    assert loss.isfinite()
    for name, p in method.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@KINDS
@torch.no_grad()
def test_an_embedding_has_no_holes_and_ignores_the_company(kind):
    encoder, x = make_method(kind).encoder, normal(3, 12, 1000)
    found = encoder(x)
    assert found.shape == (3, 256) and torch.equal(encoder(x), found)
    assert_close(encoder(x[1:2]), found[1:2], rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Wav2Vec 2
# --------------------------------------------------------------------------------------------------


def test_a_segment_of_too_few_tokens_is_refused():
    with pytest.raises(UsageError, match="^--sample-rate: 9 tokens in five seconds are too few"):
        mask_spans(2, 9, 10, random_stream(0))


@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("N, span, share", [(156, 10, 0.495), (31, 2, 0.547), (12, 10, 11 / 12)])
def test_masks_are_spans_cut_at_random_to_equally_many_tokens(N, span, share, B):
    shares, cut = [], set()
    for seed in range(300):
        draw, spans = random_stream(seed), []
        count = max(2, int(0.65 * N / span + float(torch.rand(1, generator=draw))))
        for keys in torch.rand(B, N - span, generator=draw).tolist():
            starts = sorted(range(N - span), key=keys.__getitem__)[:count]
            spans.append({start + i for start in starts for i in range(span)})
        for row, whole in zip(mask_spans(B, N, span, random_stream(seed)), spans, strict=True):
            one = set(row.nonzero()[:, 0].tolist())
            assert one <= whole and len(one) == min(map(len, spans))
            shares.append(len(one) / N)
            cut |= whole - one
    if B == 1:
        assert sum(shares) / 300 == pytest.approx(share, abs=0.02) and not cut
    assert B == 1 or N == 12 or len(cut) > 0.9 * N  # from anywhere


@pytest.mark.parametrize("training", [False, True])
def test_the_quantiser_takes_a_codeword_of_each_group(training):
    """The likeliest in eval; in training by a soft choice with noise, whose gradient it has."""
    torch.manual_seed(0)
    quantiser, latents, weight = Quantiser(5, 3).train(training), normal(2, 4, 256), normal(2, 4, 6)
    quantiser.choose.weight.data *= 0.05  # so that noise often decides
    torch.manual_seed(1)
    words, codes, usage = quantiser(latents, 0.7)
    logits = quantiser.choose(latents).unflatten(-1, (2, 5))
    torch.manual_seed(1)
    soft = F.gumbel_softmax(logits, 0.7) if training else logits
    expected = torch.zeros(2, 5)
    for b, m, g in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(2)):
        i = int(soft[b, m, g].argmax())
        assert codes[b, m, g] == i
        assert_close(words[b, m, 3 * g : 3 * g + 3], quantiser.codewords[g, i])
        expected[g] += logits[b, m, g].softmax(0) / 8  # without noise or temperature
    assert_close(usage, expected)
    if training:
        blend = torch.cat([soft[:, :, g] @ quantiser.codewords[g] for g in range(2)], -1)
        hard_and_soft = (
            torch.autograd.grad((w * weight).sum(), quantiser.choose.weight)[0]
            for w in (words, blend)
        )
        assert_close(*hard_and_soft, rtol=1e-4, atol=1e-5)
        nn.init.zeros_(quantiser.choose.weight)
        quantiser.choose.bias.data[[3, 5 + 1]] = 40  # which no noise overrules
        words, codes, _ = quantiser(latents, 2.0)
        words.square().sum().backward()
        assert (codes == torch.tensor([3, 1])).all() and quantiser.choose.weight.grad.any()


def test_usage_is_the_mean_over_processes(monkeypatch):
    quantiser, latents = Quantiser(5, 3), normal(2, 4, 256)
    here, elsewhere = quantiser(latents, 1.0)[2], normal(2, 5).softmax(1)
    monkeypatch.setattr(wav2vec2, "gather", lambda z: torch.cat([z, elsewhere[None]]))
    assert_close(quantiser(latents, 1.0)[2], (here + elsewhere) / 2)


def test_a_hole_is_compared_with_its_target_and_with_other_holes_of_its_segment():
    B, M, K = 3, 6, 500
    predicted, targets = normal(B, M, 7).double(), normal(B, M, 7, seed=1).double()
    codes = torch.tensor([[0, 0], [1, 1], [0, 0], [0, 0], [0, 1], [2, 1]]).repeat(B, 1, 1)
    codes[2] = torch.arange(M)[:, None]
    logits = contrast(predicted, targets, codes, K, random_stream(0))
    assert logits.shape == (B, M, 1 + K) and logits.dtype == torch.float64
    for b, m in torch.cartesian_prod(torch.arange(B), torch.arange(M)).tolist():
        a, equal = predicted[b, m], {m}
        if b < 2 and m in (0, 2, 3):
            equal = {0, 2, 3}
        cosines = torch.stack([a @ t / a.norm() / t.norm() / 0.1 for t in targets[b]])
        assert_close(logits[b, m, 0], cosines[m])
        candidates = cosines[[j for j in range(M) if j not in equal]]
        is_left = logits[b, m, 1:] > -torch.inf
        distance = (logits[b, m, 1:][is_left, None] - candidates).abs()
        assert distance.amin(1).max() < 1e-9
        shares = distance.argmin(1).bincount(minlength=len(candidates)) / K
        assert (shares - 1 / (M - 1)).abs().max() < 0.08  # those of equal codes were drawn, too
        assert is_left.all() == (len(equal) == 1)


@pytest.mark.parametrize("bias", [None, 0.0, 1e4], ids=["as drawn", "uniform", "one code"])
@torch.no_grad()
def test_the_loss_has_three_terms(monkeypatch, bias):
    method = make_method(Wav2Vec2)
    quantiser = method.quantiser
    if bias is not None:
        nn.init.zeros_(quantiser.choose.weight)
        quantiser.choose.bias[[5, 64 + 7]] = bias
    masks, compared = (spy(monkeypatch, wav2vec2, name) for name in ("mask_spans", "contrast"))
    holes = spy(monkeypatch, method, "fill_holes")
    ecg = 3 + 5 * normal(3, 12, 1000)
    loss, numbers = method(ecg, None, random_stream(0))
    (((x, _), (_, context, _)),) = holes
    assert x.shape == (3, 12, 500)
    assert_close(x, random_segment(zscore(ecg), random_stream(0)))  # scored whole, as a probe does
    (((B, N, span, _), is_masked),) = masks
    (((predicted, targets, codes, count, _), logits),) = compared
    assert (B, N, span, count) == (3, 31, 2, 20)

    latents = method.encoder.latents(x)
    rows = [[n for n in range(31) if is_masked[b, n]] for b in range(3)]
    there = torch.stack([F.layer_norm(latents[b, rows[b]], (256,)) for b in range(3)])
    words, which, _ = quantiser(there, 1.0)
    assert_close(targets, method.project_target(words))
    assert torch.equal(codes, which)
    context = torch.stack([context[b, rows[b]] for b in range(3)])
    assert_close(predicted, method.project_context(context))

    cross_entropy = -(logits[..., 0].exp() / logits.exp().sum(-1)).log().mean()
    usage = quantiser.choose(there).double().view(-1, 2, 64).softmax(-1).mean(0).tolist()
    in_use = sum(math.exp(-sum(p * math.log(p) for p in row if p)) for row in usage)
    if bias is None:
        assert 10 < in_use < 118 and 1 < cross_entropy < 10
    else:
        assert in_use == pytest.approx(2 if bias else 128) and cross_entropy == 0
        assert float(numbers["code_perplexity"]) == pytest.approx(2)  # likeliest codes, not usage
        assert float(numbers["equal_distractors"]) == 1
    expected = cross_entropy + 0.1 * (128 - in_use) / 128 + 10 * latents.square().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_what_stands_under_a_mask_does_not_reach_the_context(monkeypatch):
    method, is_masked = make_method(Wav2Vec2), mask_spans(2, 31, 2, random_stream(3))
    latents, other = normal(2, 31, 256), normal(2, 31, 256, seed=1)
    monkeypatch.setattr(wav2vec2, "mask_spans", lambda *_: is_masked)
    entered = spy(monkeypatch, method.encoder, "contextualise")

    def context(latents):
        monkeypatch.setattr(method.encoder, "latents", lambda x: latents)
        return method.fill_holes(torch.zeros(2, 12, 500), random_stream(0))[1]

    expected = context(latents)
    assert torch.equal(context(torch.where(is_masked[..., None], other, latents)), expected)
    assert not torch.allclose(context(torch.where(is_masked[..., None], latents, other)), expected)
    ((tokens,), _) = entered[0]
    assert (tokens[is_masked] == method.hole).all()


def test_the_temperature_falls_to_a_half_and_a_collapse_stops_the_run():
    method = make_method(Wav2Vec2, "meta")
    for progress, expected in [(0, 2), (0.35, 1), (0.7, 0.5), (0.8, 0.5), (1, 0.5)]:
        method.progress = progress
        assert method.temperature() == pytest.approx(expected)
    with pytest.raises(UsageError, match="collapsed.* 3.0"):
        method.check(dict(code_perplexity=3.0, equal_distractors=0.9))
    method.check(dict(code_perplexity=30.0))
    method.check(dict(val_loss=math.nan))


# --------------------------------------------------------------------------------------------------
# W2V-CMSC
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(), [0, *12 * [1 / 12]]),
        (dict(published=True), [math.comb(12, n) / 4096 for n in range(13)]),
        (dict(leads=1, published=True), [0, 1]),
    ],
    ids=["default", "published", "lead I"],
)
def test_how_many_leads_stay_other_ones_in_each_half(monkeypatch, settings, expected):
    method, ecg, shown = make_method(W2VCMSC, "meta", **settings), normal(12_000, 12, 4), []
    monkeypatch.setattr(w2v_cmsc, "info_nce", lambda a, b: torch.zeros(()))
    monkeypatch.setattr(method, "fill_holes", lambda x, draw: shown.append(x) or (0, x.mT, {}))
    method(ecg, None, random_stream(0))
    L = shown[0].shape[1]
    view = torch.cat(zscore(ecg[:, :L]).split(2, dim=2))  # first halves, then second ones
    is_kept = (shown[0] != 0).any(2)
    assert torch.equal(shown[0], torch.where(is_kept[..., None], view, 0))
    first, second = is_kept.chunk(2)
    assert (first == second).all(1).double().mean() < 0.2 or L == 1
    shares = is_kept.sum(1).bincount(minlength=len(expected)) / 24_000
    assert shares.tolist() == pytest.approx(expected, abs=0.01)
    assert shares[0] == 0 or settings["published"]
    share = is_kept.double().mean(0)  # of each lead
    assert (share - share.mean()).abs().max() < 0.02


@torch.no_grad()
def test_the_loss_is_that_of_the_holes_plus_that_of_the_pairs_of_all_processes(monkeypatch):
    """Another process has the same embeddings backwards."""
    method = make_method(W2VCMSC)
    monkeypatch.setattr(w2v_cmsc, "gather", lambda z: torch.cat([z, z.flip(1)]))
    calls = spy(monkeypatch, method, "fill_holes")
    loss, numbers = method(normal(3, 12, 1000), None, random_stream(0))
    ((_, (of_holes, context, _)),) = calls
    first, second = (torch.cat([z, z.flip(1)]) for z in context.double().mean(1).chunk(2))
    s = F.cosine_similarity(first[:, None], second[None], dim=-1) / 0.1
    pairs = sum(float(r.exp().sum().log() - r[i]) / 12 for i in range(6) for r in (s[i], s[:, i]))
    assert float(loss - of_holes) == pytest.approx(pairs, rel=1e-4)
    assert float(numbers["contrastive"]) == pytest.approx(pairs, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# ST-MEM
# --------------------------------------------------------------------------------------------------


def test_time_is_told_by_sines_and_cosines_between_zeros():
    code = time_code(8)
    assert code.shape == (32, 8) and not code[0].any() and not code[31].any()
    for k in range(30):
        angles = [k / 10_000 ** (i / 4) for i in range(4)]
        expected = [*map(math.sin, angles), *map(math.cos, angles)]
        assert code[1 + k].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def tiny(monkeypatch):
    """ST-MEM whose decoder is as wide as its encoder."""
    shape = dict(width=16, layers=1, heads=2, feed_forward=16)
    monkeypatch.setitem(st_mem.SIZES, "small", dict(patch=30, **shape))
    monkeypatch.setitem(st_mem.DECODERS, "small", shape)
    return make_method(STMEM)


@torch.no_grad()
def test_seven_patches_of_each_lead_are_seen_and_return_to_their_places(tiny, monkeypatch):
    """Shuffled and put back: the identity; the learned vector is everywhere else."""
    tiny.narrow, tiny.encoder.norm, entered = nn.Identity(), nn.Identity(), []
    placed, filled = spy(monkeypatch, tiny.encoder, "place"), spy(monkeypatch, tiny, "fill_holes")
    tiny.layers[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    pad = nn.ConstantPad2d((0, 0, 1, 1), 5.0)  # separators
    monkeypatch.setattr(tiny.encoder, "contextualise", lambda tokens, lead_vectors: pad(tokens))
    tiny(normal(20, 12, 1000), None, random_stream(0))
    tokens, seen = placed[0][1], filled[0][0][1]
    decoded = entered[0].unflatten(0, (20, 8)) - time_code(16)
    last_layer = tiny.layers[0](entered[0])[:, 1:-1].unflatten(0, (20, 8))
    assert_close(filled[0][1], tiny.predict(tiny.norm(last_layer)))
    assert seen.shape == (20, 8, 7, 1) and (decoded[:, :, [0, 31]] == 5).all()
    times = torch.zeros(30)
    for b, r in torch.cartesian_prod(torch.arange(20), torch.arange(8)):
        chosen = set(seen[b, r, :, 0].tolist())
        assert len(chosen) == 7
        times[[*chosen]] += 1
        for k in range(30):
            expected = tokens[b, r, k] if k in chosen else tiny.hole
            assert_close(decoded[b, r, 1 + k], expected)
    assert times.min() > 15 and times.max() < 65  # of 160, 37 on average
    assert (seen[:, 0].sort(1)[0] != seen[:, 1].sort(1)[0]).any((1, 2)).all()


@torch.no_grad()
def test_the_loss_is_the_squared_error_of_scored_masked_patches(tiny, monkeypatch):
    cut, seen = spy(monkeypatch, tiny.encoder, "patches"), []

    def loss(predict):
        monkeypatch.setattr(
            tiny, "fill_holes", lambda _, at: seen.append(at) or predict(cut[-1][1])
        )
        return float(tiny(3 + 5 * normal(2, 12, 1000), None, random_stream(0))[0])

    guess, errors = normal(2, 8, 30, 30), []
    found = loss(lambda patches: guess)
    ((crop,), _) = cut[0]
    assert float(crop.std()) == pytest.approx(1, rel=0.05)  # scored
    for b, r in torch.cartesian_prod(torch.arange(2), torch.arange(8)):
        for k in set(range(30)) - set(seen[0][b, r, :, 0].tolist()):
            x = crop[b, INDEPENDENT_ROWS[r], 30 * k : 30 * k + 30]
            target = (x - x.mean()) / (((x - x.mean()) ** 2).sum() / 29 + 1e-6) ** 0.5
            errors.append(float(((guess[b, r, k] - target) ** 2).mean()))
    assert len(errors) == 2 * 8 * 23
    assert found == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert loss(score_patches) < 1e-12
    assert loss(torch.zeros_like) == pytest.approx(29 / 30, rel=1e-4)  # the mean of each patch


@torch.no_grad()
def test_the_decoder_works_lead_by_lead():
    method, latents = make_method(STMEM), normal(2, 8, 9, 256)
    seen = torch.rand(2, 8, 30, generator=random_stream(1)).argsort(2)[..., :7, None]
    other = latents.clone()
    other[:, 2] = normal(2, 9, 256, seed=2)
    found, changed = method.fill_holes(latents, seen), method.fill_holes(other, seen)
    assert (found == changed).all(3).all(2).tolist() == 2 * [[r != 2 for r in range(8)]]


def embedding_by_hand(encoder, x):
    """(12, T) -> (D,), of the leads that are not all zero, from the parts of the network."""
    crops = []
    for start in (0, 50, 100):
        tokens = []
        for r, lead in enumerate(INDEPENDENT_ROWS):
            if x[lead].any():
                patches = x[lead, start : start + 900].split(30)
                places = [encoder.embed(patches[k]) + time_code(256)[1 + k] for k in range(30)]
                places = torch.stack([encoder.separator, *places, encoder.separator])
                tokens.append(places + encoder.lead_vectors[r])
        tokens = torch.cat(tokens)[None]  # (1, 32 for each lead, D)
        for layer in encoder.layers:
            tokens = layer(tokens)
        crops.append(encoder.norm(tokens[0].unflatten(0, (-1, 32))[:, 1:-1].mean((0, 1))))
    return torch.stack(crops).mean(0)


@torch.no_grad()
def test_an_absent_lead_has_no_tokens_whoever_is_beside():
    encoder, leads, entered = make_method(STMEM).encoder, [[0], [7], [1, 6, 11], [*range(12)]], []
    x = torch.zeros(4, 12, 1000)
    for i in range(4):
        x[i, leads[i]] = normal(len(leads[i]), 1000, seed=i)
    found = encoder(x)
    hook = encoder.layers[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    alone = torch.cat([encoder(x[i : i + 1]) for i in range(4)])
    hook.remove()
    assert_close(alone, found, rtol=0, atol=1e-5)
    assert [tokens.shape[1] for tokens in entered] == [32 * n for n in (1, 1, 3, 8)]
    for i in range(4):
        assert_close(found[i], embedding_by_hand(encoder, x[i]), rtol=0, atol=1e-5)
    x[3, 2:6] = 0  # what follows from I and II is not looked at
    assert torch.equal(encoder(x)[3], found[3])
    x[1] = 0  # a record that is all zeros
    assert encoder(x).isfinite().all() and encoder(x[1:2]).isfinite().all()
    assert (score_patches(torch.full((2, 30), 0.25)) == 0).all()
