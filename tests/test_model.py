"""ResNet1D is ECGFounder's Net1D, and load_ecgfounder takes its files and nothing else.

Two witnesses, neither written with selfmis.py in view: a NumPy forward pass (below, from the
description of the architecture) and net1d_golden.json (outputs of the published code for weights
and inputs made by a rule).
"""

import json
import pickle
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from selfmis import LEADS, ResNet1D, SelfCuttingDataset, UsageError, embed
from selfmis import load_ecgfounder, load_encoder, self_cut

GOLDEN = json.loads((Path(__file__).parent / "net1d_golden.json").read_text())
CASES = [key for key in GOLDEN if not key.startswith("shapes")]
PUBLISHED_DEPTHS = (2, 2, 2, 3, 3, 4, 4)
IGNORED = ("first_bn.", "dense.", ".bn1.", ".bn2.", ".bn3.")  # in the file, not in the encoder
SMALL = dict(stem=8, widths=(8, 12, 12, 20), depths=(2, 1, 2, 1), group_width=4)
CONV, GATE = "stage_list.3.block_list.1.conv2.conv.weight", "stage_list.6.block_list.3.se_fc2.bias"


# ---- a forward pass in plain NumPy ---------------------------------------------------------------


def swish(x):
    return x / (1 + np.exp(-x))


def same_conv(x, weight, bias, stride=1):
    """ceil(T / stride) samples; of an odd number of padded zeros the larger half is right."""
    B, C, T = x.shape
    c_out, width, k = weight.shape  # width: input channels a group
    out = -(-T // stride)
    pad = max(0, (out - 1) * stride + k - T)
    x = np.pad(x, ((0, 0), (0, 0), (pad // 2, pad - pad // 2)))
    y = np.zeros((B, c_out, out)) + bias[:, None]
    groups = C // width
    for group in range(groups):
        inputs = slice(group * width, (group + 1) * width)
        outputs = slice(group * c_out // groups, (group + 1) * c_out // groups)
        for tap in range(k):
            samples = slice(tap, tap + (out - 1) * stride + 1, stride)
            y[:, outputs] += weight[outputs, :, tap] @ x[:, inputs, samples]
    return y


def shortcut(x, channels, halve):
    """Maximum of sample pairs, a last odd one with 0; new channels are zeros on both sides."""
    if halve:
        x = np.pad(x, ((0, 0), (0, 0), (0, x.shape[2] % 2)))
        x = np.maximum(x[:, :, 0::2], x[:, :, 1::2])
    more = channels - x.shape[1]
    return np.pad(x, ((0, 0), (more // 2, more - more // 2), (0, 0)))


def numpy_forward(x, state, depths):
    """(B, leads, T) -> (B, D) in float64; state maps ECGFounder's names to arrays."""
    state = {key: np.asarray(value, dtype=np.float64) for key, value in state.items()}

    def conv(x, name, stride=1):
        return same_conv(x, state[name + ".conv.weight"], state[name + ".conv.bias"], stride)

    def linear(x, name):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    x = swish(conv(np.asarray(x, dtype=np.float64), "first_conv", 2))
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name = f"stage_list.{stage}.block_list.{block}."
            y = conv(x if stage == block == 0 else swish(x), name + "conv1")
            y = conv(swish(y), name + "conv2", 2 if block == 0 else 1)
            y = conv(swish(y), name + "conv3")
            gate = linear(swish(linear(y.mean(2), name + "se_fc1")), name + "se_fc2")
            x = y / (1 + np.exp(-gate))[:, :, None] + shortcut(x, y.shape[1], halve=block == 0)
    return x.mean(2)


# ---- weights, inputs and files -------------------------------------------------------------------


def seeded(seed, shape):
    return np.random.RandomState(seed % 2**32).standard_normal(shape).astype(np.float32)


def ruled_weights(shapes, seed=0):
    """The rule that made net1d_golden.json: a tensor is a function of key, shape and seed."""
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        w = seeded(zlib.crc32(key.encode()) + seed, shape)
        if key.endswith("weight") and len(shape) > 1:
            w *= 1.4 / np.sqrt(np.prod(shape[1:]))
        elif "running_var" in key:
            w = np.abs(w) + 0.5
        else:
            w *= 0.1
        state[key] = torch.from_numpy(w)
    return state


def ruled_encoder(leads, **size):
    """A float64 ResNet1D with the rule's weights: biases, gates and signs all matter."""
    encoder = ResNet1D(leads, **size).double()
    encoder.load_state_dict(
        ruled_weights({key: tuple(w.shape) for key, w in encoder.state_dict().items()})
    )
    return encoder


def used_keys(leads):
    return {key for key in GOLDEN[f"shapes{leads}"] if not any(part in key for part in IGNORED)}


class NumPy1Pickler(pickle._Pickler):
    """Writes NumPy's scalar constructor under the module name that NumPy 1.x gave it."""

    def save_global(self, obj, name=None):
        if obj is np._core.multiarray.scalar:
            self.write(b"cnumpy.core.multiarray\nscalar\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def save_as_published(state, path, pickler=NumPy1Pickler):
    torch.save(
        {
            "epoch": 3,
            "step": 10000,
            "state_dict": state,
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "scheduler": {"best": 0.92},
            "val_auroc": np.float64(0.9204),
        },
        path,
        types.SimpleNamespace(__name__="pickle", Pickler=pickler),
    )
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{leads: (weights by the rule, encoder loaded from a file of ECGFounder's 509 entries)}."""
    found = {}
    for leads in (1, 12):
        state = ruled_weights(GOLDEN[f"shapes{leads}"])
        path = save_as_published(state, tmp_path_factory.mktemp("published") / "ECGFounder.pth")
        with zipfile.ZipFile(path) as archive:
            content = archive.read("ECGFounder/data.pkl")
        assert b"cnumpy.core.multiarray\nscalar\n" in content and b"numpy._core" not in content
        found[leads] = state, load_ecgfounder(path, leads)
        path.unlink()  # 120 MB
    return found


def hollow(leads=1):
    """All 509 entries in their shapes, but a kilobyte each on disk: numbers do not matter here."""
    return {key: torch.zeros(()).expand(shape) for key, shape in GOLDEN[f"shapes{leads}"].items()}


def load_error(tmp_path, state, leads=1):
    with pytest.raises(UsageError) as error:
        load_ecgfounder(save_as_published(state, tmp_path / "broken.pth"), leads)
    return str(error.value)


# ---- the forward pass ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [16, 17, 19, 31, 64, 100, 333])
@pytest.mark.parametrize(
    "leads, size",
    [
        (1, SMALL),
        (12, SMALL),
        (3, dict(stem=6, widths=(8, 10, 16), depths=(1, 2, 2), group_width=2)),
        # 3 more channels: 1 in front, 2 behind
        (2, dict(stem=3, widths=(6, 10), depths=(2, 1), group_width=1)),
        (2, dict(stem=8, widths=(8, 16), depths=(1, 2), group_width=8, kernel_size=7)),
        # Strides and groups, which only a convolution has
        (2, dict(stem=8, widths=(8, 16), depths=(1, 2), group_width=8, kernel_size=1)),
    ],
    ids=["1-lead", "12-lead", "growing", "odd-growth", "odd-kernel", "kernel-1"],
)
def test_equals_the_numpy_forward_pass(leads, size, length):
    encoder = ruled_encoder(leads, **size)
    x = torch.from_numpy(seeded(length, (2, leads, length))).double()
    expected = numpy_forward(x, encoder.state_dict(), size["depths"])
    assert encoder(x).shape == (2, size["widths"][-1])
    np.testing.assert_allclose(encoder(x).detach(), expected, rtol=1e-10, atol=1e-12)


def test_pooling_pads_zero_beside_negative_values():
    """A negative constant out of the stem, a silent block: the padded 0 wins at an odd end only."""
    encoder = ResNet1D(1, stem=2, widths=(2,), depths=(1,), group_width=1).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.first_conv.conv.bias.fill_(-0.4)
        odd, even = encoder(torch.zeros(2, 1, 18).double()), encoder(torch.zeros(2, 1, 20).double())
    value = swish(np.float64(-0.4))
    np.testing.assert_allclose(
        odd, np.full((2, 2), value * 4 / 5), rtol=1e-12
    )  # 9 samples: 4 pairs and a single
    np.testing.assert_allclose(even, np.full((2, 2), value), rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_features_and_logits_are_those_of_the_published_code(published, case):
    """12 features, norm and 6 logits of two records, by the rule of ruled_weights and seeded."""
    leads, seed, length = map(int, case.split("/"))
    state, encoder = published[leads]
    with torch.no_grad():
        features = encoder(torch.from_numpy(seeded(seed + length, (2, leads, length))))
        logits = features @ state["dense.weight"].T + state["dense.bias"]
    for name, value in dict(
        features=features[:, :12], norm=features.norm(dim=1), logits=logits[:, :6]
    ).items():
        expected = np.array(GOLDEN[case][name])
        assert np.abs(value.numpy() - expected).max() < 1e-4 * np.abs(expected).max(), name


def test_the_numpy_forward_pass_is_the_published_one():
    """The witness of the small configurations is itself checked on the large one."""
    x = seeded(733, (2, 12, 733))
    features = numpy_forward(x, ruled_weights(GOLDEN["shapes12"]), PUBLISHED_DEPTHS)
    np.testing.assert_allclose(
        features[:, :12], GOLDEN["12/0/733"]["features"], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        np.linalg.norm(features, axis=1), GOLDEN["12/0/733"]["norm"], rtol=1e-5
    )


def test_rows_do_not_see_each_other():
    encoder, x = ruled_encoder(3, **SMALL), torch.from_numpy(seeded(1, (4, 3, 77))).double()
    together, alone = encoder(x), torch.cat([encoder(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_train_and_eval_mode_are_the_same_function():
    encoder, x = ruled_encoder(3, **SMALL), torch.from_numpy(seeded(2, (2, 3, 77))).double()
    assert torch.equal(encoder.train()(x), encoder.eval()(x))


def test_the_mean_over_time_is_of_float32_also_under_autocast():
    encoder, x = ruled_encoder(3, **SMALL).float(), torch.from_numpy(seeded(4, (2, 3, 77)))
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = encoder(x)
    assert embeddings.dtype == torch.float32
    assert not torch.equal(embeddings, embeddings.bfloat16().float())  # nor rounded on the way


def test_every_parameter_is_trainable_and_gets_a_gradient():
    encoder = ruled_encoder(3, **SMALL)
    encoder(torch.from_numpy(seeded(3, (2, 3, 77))).double()).square().sum().backward()
    idle = [
        name
        for name, p in encoder.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert idle == []


# ---- size and shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize("leads, count", [(1, 30_587_632), (12, 30_598_896)])
def test_default_size_is_ecgfounders_without_head_and_norm(leads, count):
    encoder = ResNet1D(leads)
    shapes = {key: list(w.shape) for key, w in encoder.state_dict().items()}
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert shapes == {key: GOLDEN[f"shapes{leads}"][key] for key in used_keys(leads)}
    assert len(shapes) == 202
    assert (encoder.leads, encoder.embedding_dim) == (leads, 1024)


def test_twelve_leads_are_the_default():
    assert ResNet1D(**SMALL).leads == 12


@pytest.mark.parametrize(
    "shape, named",
    [
        ((2, 12, 100), "12"),  # twelve leads for a three-lead encoder
        ((2, 1, 100), "1"),
        ((2, 3, 15), "15"),  # too short
        ((2, 3, 0), "0"),
        ((3, 100), "3, 100"),  # no batch axis
        ((1, 2, 3, 100), "1, 2, 3, 100"),
    ],
)
def test_input_of_another_shape_is_refused_by_name(shape, named):
    with pytest.raises(UsageError, match=named):
        ResNet1D(3, **SMALL)(torch.zeros(shape))


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("leads", [1, 12])
def test_published_file_loads_every_weight_and_is_in_eval_mode(published, leads):
    state, encoder = published[leads]
    assert len(state) == 509 and (encoder.leads, encoder.embedding_dim) == (leads, 1024)
    assert not any(module.training for module in encoder.modules())
    loaded = encoder.state_dict()
    assert loaded.keys() == used_keys(leads)
    assert all(torch.equal(weight, state[key]) for key, weight in loaded.items())


def test_file_with_a_scalar_of_numpy_2_loads(tmp_path):
    path = save_as_published(hollow(12), tmp_path / "numpy2.pth", pickle._Pickler)
    assert not load_ecgfounder(path, 12).first_conv.conv.weight.any()


@pytest.mark.parametrize("keys", [used_keys(1), GOLDEN["shapes1"]], ids=["202 keys", "509 keys"])
def test_plain_state_dict_loads(tmp_path, keys):
    state = {key: torch.full((), 0.5).expand(GOLDEN["shapes1"][key]) for key in keys}
    torch.save(state, tmp_path / "plain.pth")
    assert all(
        (weight == 0.5).all()
        for weight in load_ecgfounder(tmp_path / "plain.pth", 1).state_dict().values()
    )


def test_every_missing_key_is_named(tmp_path):
    message = load_error(
        tmp_path, {key: w for key, w in hollow().items() if key not in (CONV, GATE)}
    )
    assert CONV in message and GATE in message


@pytest.mark.parametrize(
    "extra",
    [
        "surplus.weight",
        "stage_list.0.block_list.0.bn4.weight",  # only bn1, bn2 and bn3 are known
        "stage_list.0.block_list.0.conv4.conv.weight",
        "first_bn2.weight",
        "dense2.weight",
        "module.dense.weight",
    ],
)
def test_extra_key_is_named(tmp_path, extra):
    """Exactly first_bn, bn1-bn3 and dense are ignored: what merely resembles them is not."""
    assert extra in load_error(tmp_path, hollow() | {extra: torch.zeros(3)})


def test_every_wrongly_shaped_key_is_named(tmp_path):
    message = load_error(
        tmp_path, hollow() | {CONV: torch.zeros(400, 16, 15), GATE: torch.zeros(1023)}
    )
    assert CONV in message and GATE in message


def test_no_wrong_key_is_left_out_of_the_message(tmp_path):
    state = hollow()
    misspelt = sorted(used_keys(1))[::20]
    for key in misspelt:
        state["my." + key] = state.pop(key)
    message = load_error(tmp_path, state)
    assert [
        key for key in misspelt if message.count(key) < 2
    ] == []  # once as missing, once as extra


@pytest.mark.parametrize("stored, asked", [(1, 12), (12, 1)])
def test_file_of_another_number_of_leads_is_refused(tmp_path, stored, asked):
    assert "first_conv.conv.weight" in load_error(tmp_path, hollow(stored), asked)


def test_only_1_and_12_leads_exist(tmp_path):
    assert "83" in load_error(tmp_path, hollow(), 83)


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    victim = tmp_path / "victim"
    torch.save({"state_dict": hollow(), "val_auroc": Intruder(victim)}, tmp_path / "evil.pth")
    with pytest.raises(UsageError, match="evil.pth: not a checkpoint that can be loaded") as error:
        load_ecgfounder(tmp_path / "evil.pth", 1)
    assert not victim.exists()
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_saved_out_of_ddp_or_compile_load(tmp_path, prefix):
    state = {prefix + key: torch.full((), 0.5).expand(w.shape) for key, w in hollow().items()}
    torch.save(state, tmp_path / "wrapped.pth")
    for encoder in (
        load_ecgfounder(tmp_path / "wrapped.pth", 1),
        load_encoder(tmp_path / "wrapped.pth"),
    ):
        assert all((weight == 0.5).all() for weight in encoder.state_dict().values())


@pytest.mark.parametrize(
    "content, named",
    [
        ({"state_dict": torch.zeros(3)}, "state_dict is a Tensor"),
        (torch.zeros(3), "holds a Tensor"),
        ([1, 2], "holds a list"),
        ({"weights": 1}, "no encoder of selfmis in it, and no ECGFounder file"),
        ({1: torch.zeros(3)}, "no encoder of selfmis in it, and no ECGFounder file"),
        # Keys that ours have too, with other things in them.
        ({"architecture": "net1d", "state_dict": {}}, "foreign.pth"),
        ({"architecture": {"leads": 1}, "state_dict": {}}, "foreign.pth"),
    ],
    ids=[
        "tensor in state_dict",
        "tensor",
        "list",
        "other keys",
        "numbers as keys",
        "named",
        "bare",
    ],
)
def test_foreign_files_get_a_sentence(tmp_path, content, named):
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(UsageError, match=named):
        load_encoder(tmp_path / "foreign.pth")


@pytest.mark.parametrize("text", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_files_that_are_no_checkpoints_get_a_sentence(tmp_path, text):
    (tmp_path / "odd.pth").write_bytes(text)
    with pytest.raises(UsageError, match="odd.pth: not a checkpoint that can be loaded") as error:
        load_encoder(tmp_path / "odd.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="nowhere.pth: there is no such file"):
        load_encoder(tmp_path / "nowhere.pth")


# ---- library calls with wrong types --------------------------------------------------------------


@pytest.mark.parametrize(
    "x, named",
    [
        (torch.zeros(2, 3, 100, dtype=torch.float64), "float64"),
        (torch.zeros(2, 3, 100, dtype=torch.int64), "int64"),
        (torch.zeros(2, 3, 100, dtype=torch.float16), "float16"),
        (np.zeros((2, 3, 100), np.float32), "ndarray"),
    ],
    ids=["float64", "int64", "float16", "array"],
)
def test_input_of_another_type_is_refused_by_name(x, named):
    with pytest.raises(UsageError, match=named):
        ResNet1D(3, **SMALL)(x)


@pytest.mark.parametrize("lead", [0, 1.0, None, "V7", ""])
def test_self_cut_refuses_what_is_no_lead(lead):
    with pytest.raises(UsageError, match=f"lead {lead!r}: expected one of I, II"):
        self_cut(np.zeros((12, 100)), lead)


@pytest.mark.parametrize(
    "records, named",
    [
        ([np.zeros((12, 1000))], "records of type ndarray: give a list of paths"),
        ([torch.zeros(12, 1000)], "records of type Tensor: give a list of paths"),
        ([0, 1], "records of type int: give a list of paths"),
        ("records100", "records of type str: give a list of paths"),
    ],
    ids=["arrays", "tensors", "numbers", "a text"],
)
def test_data_set_refuses_what_are_no_records(records, named):
    with pytest.raises(UsageError, match=named):
        SelfCuttingDataset(records, leads=LEADS)


def test_embed_takes_arrays():
    encoder = ResNet1D(3, **SMALL)
    x = seeded(4, (2, 3, 100))
    found = embed(encoder, x, torch.device("cpu"))
    assert torch.equal(found, embed(encoder, torch.from_numpy(x), torch.device("cpu")))
