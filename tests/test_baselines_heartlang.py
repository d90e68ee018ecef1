"""HeartLang: words, their vocabulary and the prediction of masked ones, against plain loops."""

import copy
import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import made_up

import selfmis
import train_pretrain
from extras.baselines import heartlang
from extras.baselines.common import random_stream, zscore
from extras.baselines.heartlang import IDLE_STEPS, BeatTransformer, HeartLang, HeartLangConfig
from extras.baselines.heartlang import Vocabulary, WordTransformer, cut_words, find_beats, mask_half
from extras.synthetic import INDEPENDENT_ROWS
from selfmis import UsageError

TINY = dict(width=16, layers=2, heads=2, feed_forward=24)
BEATS = [60, 150, 260, 330, 420, 500, 590, 700, 800, 930]  # of `pulses`
assert_close = torch.testing.assert_close


def pulses(beats):
    """(1000,) of R and S waves."""
    away = torch.arange(1000.0) - torch.tensor(beats)[:, None]
    return ((-((away / 2) ** 2)).exp() - 0.25 * (-((away / 2 - 2) ** 2)).exp()).sum(0)


@pytest.fixture(scope="module")
def ecg():
    """(3, 12, 1000) mV."""
    return torch.from_numpy(made_up(3)[0])


@pytest.fixture
def vocabulary():
    """Its codes are used already, and random."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(HeartLangConfig(size="small")).eval()
    vocabulary.idle.zero_()
    return vocabulary


@pytest.fixture
def reader(vocabulary):
    return HeartLang(HeartLangConfig(size="small"), vocabulary).eval()


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return BeatTransformer(
        12, rows=INDEPENDENT_ROWS, beats=16, slots=128, dropout=0.1, **TINY
    ).eval()


@pytest.mark.parametrize(
    "size, words, own", [("published", 23_567_072, 44_562_176), ("small", 532_864, 3_011_584)]
)
def test_parameters(size, words, own):
    config = HeartLangConfig(size=size)
    with torch.device("meta"):
        vocabulary = Vocabulary(config)
        assert sum(p.numel() for p in vocabulary.parameters()) == words
        reader = HeartLang(config, vocabulary)
    assert sum(p.numel() for p in reader.parameters() if p.requires_grad) == own


def test_a_beat_for_each_pulse_the_first_ones_where_there_are_too_many():
    x = torch.stack([pulses(BEATS), pulses(BEATS[:7])])
    for slots in (12, 4):
        for row, is_real, beats in zip(*find_beats(x, slots), (BEATS, BEATS[:7]), strict=True):
            assert is_real.tolist() == [s < len(beats) for s in range(slots)]
            assert np.abs(row[is_real].numpy() - beats[:slots]).max() <= 2


@pytest.mark.parametrize("value, slots", [(0.0, 21), (3.0, 21), (0.0, 4)])
def test_a_signal_without_beats_is_cut_evenly(value, slots):
    places, is_real = find_beats(torch.full((1, 1000), value), slots)
    assert places[is_real].tolist() == [48 + 96 * k for k in range(10)][:slots]
    assert is_real.tolist() == [[k < 10 for k in range(slots)]]


def test_words_reach_to_the_mid_points_and_are_96_samples_at_most():
    beats = [[60, 91, 300, 360, 497], [3, 250], [], [200], [0, 499]]
    places = torch.tensor([row + [0] * (5 - len(row)) for row in beats])
    is_real = torch.arange(5) < torch.tensor([len(row) for row in beats])[:, None]
    x = 1 + torch.rand(5, 3, 500, generator=random_stream(0))
    expected = torch.zeros(5, 3, 5, 96)
    for b, row in enumerate(beats):
        for s, R in enumerate(row):
            begin = (row[s - 1] + R) // 2 if s > 0 else 0
            end = (R + row[s + 1]) // 2 if s + 1 < len(row) else 500
            for t in range(max(begin, R - 48), min(end, R + 48)):
                expected[b, :, s, t - R + 48] = x[b, :, t]
    words = cut_words(x, places, is_real)
    assert torch.equal(words, expected)
    lengths = [48 + 15, 16 + 48, 48 + 30, 30 + 48, 48 + 3]
    assert (words[0, 0] != 0).sum(1).tolist() == lengths
    assert words[0, 1, 2, 48] == x[0, 1, 300]


def test_lead_I_cuts_all_leads_at_the_same_samples(encoder):
    encoder.rows = list(range(12))
    x = torch.arange(1.0, 1001) * torch.ones(1, 12, 1)
    x[:, 0] = 1 + pulses(BEATS)
    x[:, 4] = 0
    words, places, is_real = encoder.cut(x)
    assert is_real[0].sum(1).tolist() == [10] * 4 + [0] + [10] * 7
    samples = words[0, 1].long() - 1  # -1: outside
    assert (samples[:, 48] == places[0]).where(is_real[0, 1], True).all()
    assert torch.equal(words[0, 0], x[0, 0, samples.clamp(0)] * (samples >= 0))
    assert (words[:, [2, 3, *range(5, 12)]] == words[:, 1:2]).all()
    assert torch.equal(encoder.cut(torch.cat([x[:, :1], x[:, 1:].flip(2)], 1))[1], places)


def test_the_last_word_that_is_kept_ends_before_the_next_beat(encoder):
    x = torch.zeros(1, 12, 1000)
    x[:] = pulses(list(range(10, 1000, 42)))  # 24, of which 16 are kept
    words, places, is_real = encoder.cut(x)
    assert words.shape[2] == places.shape[1] == 16 and is_real.all()
    peaks = (words[0, 0] > 0.5).any(1) & (words[0, 0].argmax(1) == 48)
    assert peaks[1:].all()
    assert (words[0, 0, 1:].sum(1) - words[0, 0, 1].sum()).abs().max() < 0.01  # one R in each


@pytest.fixture
def network():
    """It, (2, 3, 5, 96) float64, of which some are real, and which."""
    torch.manual_seed(0)
    words = torch.randn(2, 3, 5, 96).double()
    is_real = (torch.arange(5) < torch.tensor([3, 5])[:, None])[:, None].repeat(1, 3, 1)
    is_real[0, 1] = False
    return WordTransformer(96, 20, **TINY).double(), words * is_real[..., None], is_real


@torch.no_grad()
def test_a_word_looks_at_its_neighbours_in_its_own_lead(network):
    network, words, _ = network
    padded = F.pad(words, (0, 0, 1, 1))
    kernel = network.neighbours.weight  # (D, 96, 3)
    expected = sum(padded[:, :, k : k + 5] @ kernel[..., k].T for k in range(3))
    found = network.look(words)
    assert_close(found, expected + network.positions[1:16].view(3, 5, 16))
    words[0, 0, 4] += 1  # the last word of the first lead
    changed = (network.look(words) != found).any(3)
    assert changed.nonzero().tolist() == [[0, 0, 3], [0, 0, 4]]


@torch.no_grad()
def test_padding_is_read_by_nobody(network):
    network, words, is_real = network
    tokens = network.look(words)
    noisy = torch.where(is_real[..., None], tokens, 10 * torch.randn_like(tokens))
    expected = network.read(tokens, is_real)
    assert_close(network.read(noisy, is_real)[is_real], expected[is_real])
    without_mask = network.read(noisy, torch.ones_like(is_real))
    assert not torch.allclose(without_mask[is_real], expected[is_real])
    alone = network.read(tokens[:1, ::2, :3], is_real[:1, ::2, :3])  # without any padding
    assert_close(alone, expected[:1, ::2, :3])


@torch.no_grad()
def test_an_embedding_is_the_same_alone_in_company_and_twice(ecg, encoder):
    x = torch.cat([zscore(ecg), torch.zeros(2, 12, 1000)])
    x[3, 0] = zscore(ecg[:1, :1])[0, 0]  # lead I and eleven empty ones; the last is all zero
    together = encoder(x)
    assert together.isfinite().all() and torch.equal(encoder(x), together)
    for i in range(5):
        assert_close(encoder(x[i : i + 1])[0], together[i], rtol=0, atol=1e-5)
    assert torch.cdist(together, together).add(torch.eye(5)).min() > 0.01
    encoder.train()  # dropout
    assert not torch.equal(encoder(x), encoder(x))


@torch.no_grad()
def test_lead_I_with_empty_leads_is_its_words_alone(ecg, encoder):
    x = torch.zeros(1, 12, 1000)
    x[:, 0] = zscore(ecg[:1, :1])[:, 0]
    places, is_beat = find_beats(x[:, 0], 16)
    n = int(is_beat.sum())
    assert 5 < n < 16
    words = cut_words(x[:, :1], places, is_beat)[:, :, :n]
    seconds = torch.stack([encoder.second_vectors[R // 100] for R in places[0, :n].tolist()])
    tokens = encoder.transformer.look(words) + encoder.lead_vectors[0] + seconds
    read = encoder.transformer.read(tokens, torch.ones(1, 1, n, dtype=torch.bool))
    assert_close(encoder(x), read[:, 0].mean(1), rtol=0, atol=1e-5)


def unit_vectors(*shape):
    return F.normalize(torch.randn(*shape, 32, generator=random_stream(1)), dim=-1)


def nearest(z, codes):
    """By brute force: (N, C), (V, C) -> N numbers."""
    z, codes = z.detach().double().numpy(), codes.double().numpy()
    return [int(np.argmin([np.linalg.norm(row - code) for code in codes])) for row in z]


def test_the_nearest_code_by_brute_force(vocabulary):
    z = unit_vectors(4, 5)
    expected = nearest(z.flatten(0, 1), vocabulary.codes)
    assert vocabulary.nearest(z).flatten().tolist() == expected


def test_codes_go_a_hundredth_of_the_way_to_their_words(vocabulary):
    z, taken = unit_vectors(6), torch.tensor([7, 7, 7, 2, 2, 500])
    vocabulary.idle += torch.arange(512) % 5
    codes, idle = vocabulary.codes.clone(), vocabulary.idle + 1
    for k in (2, 7, 500):
        mean = z[taken == k].mean(0)
        code = 0.99 * codes[k] + 0.01 * mean / mean.norm()
        codes[k], idle[k] = code / code.norm(), 0
    vocabulary.move_codes(z, taken)
    assert_close(vocabulary.codes, codes, rtol=0, atol=1e-6)
    assert torch.equal(vocabulary.idle, idle)
    assert_close(vocabulary.codes.norm(dim=1), torch.ones(512))


def test_codes_go_to_the_words_of_all_processes(vocabulary, monkeypatch):
    z, taken = unit_vectors(6), torch.tensor([7, 7, 2, 7, 2, 500])
    together = copy.deepcopy(vocabulary)
    together.move_codes(z, taken)

    def add_those_of_the_other(total):
        words_or_ones = z[3:] if total.dim() == 2 else torch.ones(3, dtype=torch.int64)
        total.index_add_(0, taken[3:], words_or_ones)

    monkeypatch.setattr(heartlang.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(heartlang.dist, "all_reduce", add_those_of_the_other)
    vocabulary.move_codes(z[:3], taken[:3])
    assert_close(vocabulary.codes, together.codes)
    assert torch.equal(vocabulary.idle, together.idle)


def test_codes_that_are_idle_for_long_become_words(vocabulary):
    z, before = unit_vectors(9), vocabulary.codes.clone()
    vocabulary.idle[5:9] = torch.tensor([IDLE_STEPS - 1, IDLE_STEPS, IDLE_STEPS, IDLE_STEPS + 1])
    vocabulary.start_idle_codes(z, random_stream(0))
    assert (vocabulary.codes != before).any(1).nonzero().flatten().tolist() == [6, 7, 8]
    assert all((z == code).all(1).any() for code in vocabulary.codes[6:9])
    assert vocabulary.idle[5:9].tolist() == [IDLE_STEPS - 1, 0, 0, 0]


def test_the_gradient_of_a_drawn_word_passes_its_code(ecg, vocabulary, monkeypatch):
    """At z it is that of the decoder's input, and that of the distance; padding has none."""
    words, _, is_real = vocabulary.encoder.cut(zscore(ecg))
    z = unit_vectors(*is_real.shape).requires_grad_()
    seen = []

    def look(passed, real=vocabulary.decoder.look):
        passed.retain_grad()
        seen.append(passed)
        return real(passed)

    monkeypatch.setattr(vocabulary, "latents", lambda *_: z)
    monkeypatch.setattr(vocabulary.decoder, "look", look)
    vocabulary.idle[:3] = IDLE_STEPS
    before = [value.clone() for value in vocabulary.buffers()]
    loss, numbers = vocabulary(ecg, None, random_stream(0))
    loss.backward()
    codes = vocabulary.codes[nearest(z[is_real], vocabulary.codes)]
    assert_close(seen[0][is_real], codes)
    assert (seen[0][~is_real] == 0).all() and (z.grad[~is_real] == 0).all()
    away, gradient = z[is_real].detach() - codes, seen[0].grad[is_real]
    assert gradient.abs().max() > 1e-5
    assert_close(z.grad[is_real], gradient + 2 * away / away.numel())

    drawn = vocabulary.sketch(vocabulary.decoder.read(look(seen[0]), is_real))
    error = (drawn - words)[is_real].square().mean()
    assert_close(numbers["error"], error.detach())
    assert_close(loss, error + away.square().mean())
    assert all(map(torch.equal, vocabulary.buffers(), before))  # not in eval mode


def test_in_training_codes_start_as_real_words_and_move(ecg, vocabulary, monkeypatch):
    vocabulary.train().idle.fill_(IDLE_STEPS)
    words, places, is_real = vocabulary.encoder.cut(zscore(ecg))
    read = vocabulary.encoder.transformer.read(vocabulary.encoder.tokens(words, places), is_real)
    z = vocabulary.squeeze(read)[is_real].detach()
    z = z / z.norm(dim=1, keepdim=True)
    seen = []

    def move(*arguments, real=vocabulary.move_codes):
        seen.extend([*arguments, vocabulary.codes.clone()])
        real(*arguments)

    monkeypatch.setattr(vocabulary, "move_codes", move)
    vocabulary(ecg, None, random_stream(0))
    found, taken, codes = seen
    assert_close(found, z)
    assert all((found == code).all(1).any() for code in codes)
    assert_close((z * codes[taken]).sum(1), (z @ codes.T).max(1).values)
    assert not torch.equal(vocabulary.codes, codes)
    assert torch.equal(vocabulary.idle == 0, torch.bincount(taken, minlength=512) > 0)


def test_half_of_the_real_words_are_masked():
    is_real = torch.rand(40, 3, 7, generator=random_stream(0)) < 0.6
    is_real[0] = False
    masks = torch.stack([mask_half(is_real, random_stream(seed)) for seed in range(400)])
    assert not (masks & ~is_real).any() and not torch.equal(masks[0], masks[1])
    assert torch.equal(mask_half(is_real, random_stream(0)), masks[0])
    assert (masks.sum((2, 3)) == is_real.sum((1, 2)) // 2).all()
    assert (masks[:, is_real].double().mean(0) > 0.3).all()  # any of them


def test_the_loss_is_the_cross_entropy_of_masked_words(ecg, reader):
    words, places, is_real = reader.encoder.cut(zscore(ecg))
    seen = []
    reader.encoder.transformer.layers[0].register_forward_pre_hook(
        lambda _, call: seen.append(call[1])
    )
    reader.encoder.transformer.norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    loss, numbers = reader(ecg, None, random_stream(5))
    assert torch.equal(seen[0][:, 1:], is_real.flatten(1))
    is_masked = mask_half(is_real, random_stream(5))
    read = seen[1][:, 1:].view(*is_real.shape, -1)[is_masked]  # without CLS
    log_p = reader.predict(read).double().log_softmax(1).tolist()
    z = reader.vocabulary.latents(words, places, is_real)[is_masked]
    codes = nearest(z, reader.vocabulary.codes)
    assert len(codes) == (is_real.sum((1, 2)) // 2).sum() and len(set(codes)) > 5
    losses = [-row[code] for row, code in zip(log_p, codes, strict=True)]
    assert loss.item() == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    right = [int(np.argmax(row)) == code for row, code in zip(log_p, codes, strict=True)]
    assert numbers["accuracy"].item() == pytest.approx(np.mean(right))


def test_the_vocabulary_does_not_learn_from_masked_words(ecg, reader):
    before = [value.clone() for value in reader.vocabulary.state_dict().values()]
    reader.train()(ecg, None, random_stream(0))[0].backward()
    assert all(p.grad is None for p in reader.vocabulary.parameters())
    assert all(map(torch.equal, reader.vocabulary.state_dict().values(), before))
    assert all(p.grad.abs().max() > 0 for p in reader.parameters() if p.requires_grad)


@torch.no_grad()
def test_a_masked_word_is_not_given_away(ecg, reader, monkeypatch):
    words, places, is_real = reader.encoder.cut(zscore(ecg))
    targets = torch.arange(is_real.numel()).view(is_real.shape) % 512
    monkeypatch.setattr(reader.vocabulary, "nearest", lambda z: targets)
    is_masked = mask_half(is_real, random_stream(5))
    noise = torch.randn(words.shape, generator=random_stream(0))

    def loss(noisy):
        changed = words + noise * noisy[..., None]
        monkeypatch.setattr(reader.encoder, "cut", lambda x: (changed, places, is_real))
        return reader(ecg, None, random_stream(5))[0]

    unchanged = loss(torch.zeros_like(is_real))
    assert torch.equal(loss(is_masked), unchanged)
    assert (loss(is_real & ~is_masked) - unchanged).abs() > 1e-4


def test_a_run_learns_words_then_reads_them_and_resumes(tmp_path, ptbxl, monkeypatch):
    out = tmp_path / "out"
    settings = dict(epochs=1, vocabulary_epochs=1, batch_size=8, warmup=0, workers=0, leads=1)
    settings |= dict(data=[str(ptbxl)], size="small", out=str(out))
    config = HeartLangConfig(**settings)
    entry = heartlang.train(config)
    assert entry["epoch"] == 1 and np.isfinite([entry["train_loss"], entry["val_loss"]]).all()
    words, last = (torch.load(path / "last.pt", weights_only=True) for path in (out / "words", out))
    encoder = selfmis.load_encoder(out / "best.pt")
    assert isinstance(encoder, BeatTransformer)
    assert (encoder.lead, encoder.sample_rate_hz, encoder.rows) == ("I", 100, [0])
    for part, state in (("vocabulary", words["model"]), ("encoder", encoder.state_dict())):
        for name, value in state.items():
            assert torch.equal(last["model"][f"{part}.{name}"], value), name

    steps = []
    monkeypatch.setattr(train_pretrain, "train_one_epoch", steps.append)
    assert heartlang.train(dataclasses.replace(config, resume=True)) == entry and not steps
    assert (tmp_path / "cache").is_dir() and not (out / "cache").exists()  # one for both

    # A folder that is taken is refused before the vocabulary trains.
    shutil.rmtree(out / "words")
    with pytest.raises(UsageError, match="holds a run"):
        heartlang.train(config)
    assert not (out / "words").exists()


def test_another_rate_and_no_epoch_of_the_vocabulary_are_refused():
    with pytest.raises(UsageError, match=r"^--sample-rate 500: words are cut at 100 Hz$"):
        HeartLangConfig(sample_rate=500)
    with pytest.raises(UsageError, match="^--vocabulary-epochs 0: expected a number above 0$"):
        HeartLangConfig(vocabulary_epochs=0)
