"""ROC-AUC, its bootstrap and retrieval, against counts, identities and published examples."""

import math

import numpy as np
import pytest
import torch

from selfmis import UsageError, bootstrap_auc, interval, macro_auc, retrieval, roc_auc


def counted_auc(y, score):
    """The share of (positive, negative) pairs in the right order, a tie counting half."""
    positive, negative = score[y == 1][:, None], score[y == 0][None, :]
    return ((positive > negative) + 0.5 * (positive == negative)).mean()


def labelled(n, K=None, shift=1.0, levels=None, seed=0):
    """Labels with both values in each column, scores that know something; levels makes ties."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, (n, K or 1))
    y[:2] = [[0], [1]]
    score = rng.standard_normal(y.shape) + shift * y
    if levels:
        score = np.round(score * levels)
    return (y, score) if K else (y[:, 0], score[:, 0])


# ---- AUC -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 0.5, 2], ids=["distinct", "many-ties", "some-ties"])
def test_auc_is_the_share_of_ordered_pairs(levels):
    for seed in range(200):
        y, score = labelled(2 + seed % 40, levels=levels, seed=seed)
        assert roc_auc(y, score) == pytest.approx(counted_auc(y, score), abs=1e-12)


def test_auc_of_scikit_learns_published_example():
    """The example in the documentation of sklearn.metrics.roc_auc_score."""
    auc = roc_auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    assert auc == 0.75 and isinstance(auc, float)


def test_auc_of_the_opposite_is_the_rest():
    y, score = labelled(50, levels=2)
    assert roc_auc(y, -score) == pytest.approx(1 - roc_auc(y, score), abs=1e-12)
    assert roc_auc(1 - y, score) == pytest.approx(1 - roc_auc(y, score), abs=1e-12)


def test_auc_ignores_increasing_maps_row_order_and_doubling():
    y, score = labelled(50, levels=2)
    order = np.random.default_rng(1).permutation(50)
    for same in (
        roc_auc(y, np.exp(score)),
        roc_auc(y, 1e6 * score - 3),
        roc_auc(y[order], score[order]),
        roc_auc(np.tile(y, 2), np.tile(score, 2)),
    ):
        assert same == pytest.approx(roc_auc(y, score), abs=1e-12)


@pytest.mark.parametrize("y", [[0, 1], [1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
def test_auc_of_a_constant_score_is_half_in_any_row_order(y):
    assert roc_auc(y, [0.3] * len(y)) == 0.5


@pytest.mark.parametrize(
    "score, auc",
    [
        ([math.inf, math.inf, 0], 0.25),  # positive, negative, positive: a tie at the top
        ([-math.inf, -math.inf, -math.inf], 0.5),
        ([math.inf, -math.inf, math.inf], 1.0),
        ([1e308, -1e308, 1e308], 1.0),
    ],
)
def test_auc_ranks_infinite_scores_like_any_other(score, auc):
    """A saturated probability has an infinite logit."""
    assert roc_auc([1, 0, 1], score) == auc
    assert (
        bootstrap_auc([[1], [0], [1]], np.array(score)[:, None], [1, 1, 1], draws=3) == auc
    ).all()


@pytest.mark.parametrize("y", [[0], [1], [0, 0, 0], [1, 1, 1]])
def test_auc_without_one_of_the_classes_is_nan(y):
    assert math.isnan(roc_auc(y, np.arange(len(y))))


def test_auc_ranks_float32_logits_in_full_precision():
    """Neighbouring float32 and float64 logits are told apart; half precision ties them all."""
    y = np.array([0, 0, 1, 1])
    for one in (np.float32(30), np.float64(30)):
        logits = one + np.spacing(one) * np.arange(4, dtype=one.dtype)
        assert roc_auc(y, logits) == roc_auc(y, torch.from_numpy(logits)) == 1.0
        assert roc_auc(y, torch.from_numpy(logits).half()) == 0.5


@pytest.mark.parametrize(
    "kind",
    [
        list,
        np.asarray,
        torch.as_tensor,
        lambda x: torch.as_tensor(x).half(),
        lambda x: torch.as_tensor(x).bfloat16(),
        lambda x: np.float16(x),
    ],
    ids=["list", "array", "tensor", "half tensor", "bfloat16 tensor", "half array"],
)
def test_auc_takes_lists_arrays_and_tensors(kind):
    y, score = labelled(30, levels=2)
    assert roc_auc(kind(y), kind(score)) == pytest.approx(counted_auc(y, score), abs=1e-12)


def test_auc_takes_boolean_labels():
    y, score = labelled(30)
    assert roc_auc(y == 1, score) == roc_auc(y, score)


@pytest.mark.parametrize(
    "y, score, named",
    [
        ([0, 1, 1], [0.1, 0.2], r"3.*2"),
        ([0, 1], [[0.1], [0.2]], r"2, 1"),
        ([0, 2, 1], [0.1, 0.2, 0.3], "2"),
        ([0, 0.5, 1], [0.1, 0.2, 0.3], "0.5"),
        ([0, -1, 1], [0.1, 0.2, 0.3], "-1"),
        ([0, math.nan, 1], [0.1, 0.2, 0.3], "(?i)nan"),
        ([0, 1, 1], [0.1, math.nan, 0.3], "(?i)nan"),
        ([], [], "(?i)empty|no |0"),
    ],
)
def test_auc_refuses_bad_input_by_name(y, score, named):
    with pytest.raises(UsageError, match=named):
        roc_auc(y, score)


def test_macro_auc_is_the_mean_of_the_columns_and_leaves_absent_classes_out():
    y, score = labelled(60, K=5)
    y[:, 1], y[:, 3] = 0, 1
    mean, each = macro_auc(y, score)
    expected = [counted_auc(y[:, k], score[:, k]) for k in (0, 2, 4)]
    assert np.isnan(each[[1, 3]]).all() and each.shape == (5,)
    np.testing.assert_allclose(each[[0, 2, 4]], expected, rtol=1e-12)
    assert mean == pytest.approx(np.mean(expected), rel=1e-12)


def test_macro_auc_ranks_the_whole_set_at_once():
    """Two batches of AUC 1 on scales of their own: the second's negatives pass the first's hits."""
    y, score = np.array([[0], [1], [0], [1]]), np.array([[0.0], [1.0], [2.0], [3.0]])
    assert macro_auc(y[:2], score[:2])[0] == macro_auc(y[2:], score[2:])[0] == 1.0
    assert macro_auc(y, score)[0] == 0.75


@pytest.mark.parametrize(
    "y, score",
    [
        (np.eye(3), np.zeros((3, 2))),
        (np.eye(3), np.zeros((2, 3))),
        (np.eye(3), np.full((3, 3), np.nan)),
        (2 * np.eye(3), np.zeros((3, 3))),
    ],
)
def test_macro_auc_refuses_bad_input(y, score):
    with pytest.raises(UsageError):
        macro_auc(y, score)


# ---- bootstrap -----------------------------------------------------------------------------------


def test_interval_is_the_central_percentiles():
    """Of 95 % by default."""
    values = np.random.default_rng(0).permutation(1001)
    assert interval(values) == pytest.approx((25, 975))
    assert interval(values, level=0.5) == pytest.approx((250, 750))


def test_interval_is_of_one_number():
    with pytest.raises(UsageError, match=r"\(10, 3\)"):
        interval(np.zeros((10, 3)))


@pytest.mark.parametrize(
    "y, groups, named",
    [
        ([0, 1, 1], None, r"\(3,\): expected \(N, K\)"),
        ([[0], [1], [1]], [1, 2], r"\(3, 1\) with 2 groups: expected one each"),
    ],
)
def test_bootstrap_refuses_bad_input_by_name(y, groups, named):
    with pytest.raises(UsageError, match=named):
        bootstrap_auc(y, np.zeros(np.shape(y)), groups)


def test_bootstrap_interval_holds_the_point_value():
    y, score = labelled(200, K=3)
    draws = bootstrap_auc(y, score, draws=300)
    assert draws.shape == (300, 3)
    for k in range(3):
        low, high = interval(draws[:, k])
        assert low < counted_auc(y[:, k], score[:, k]) < high


def test_bootstrap_repeats_with_its_seed_and_only_with_it():
    y, score = labelled(50, K=2)
    draws = {seed: bootstrap_auc(y, score, draws=20, seed=seed) for seed in (0, 3, 4)}
    assert np.array_equal(draws[3], bootstrap_auc(y, score, draws=20, seed=3))
    assert not np.array_equal(draws[3], draws[4])
    assert np.array_equal(draws[0], bootstrap_auc(y, score, draws=20))


def test_bootstrap_draws_differ():
    y, score = labelled(200, K=1)
    assert len(np.unique(bootstrap_auc(y, score, draws=50))) > 40


def test_bootstrap_interval_shrinks_with_the_root_of_n():
    """16 times the records, a quarter of the width."""
    widths = []
    for n in (150, 2400):
        low, high = interval(bootstrap_auc(*labelled(n, K=1), draws=400)[:, 0])
        widths.append(high - low)
    assert 3 < widths[0] / widths[1] < 5.3


def test_bootstrap_draws_whole_patients():
    """Two patients, a positive and a negative each: AA gives 1, BB 0, AB 3/4, split ones others."""
    y, score, groups = [[1], [1], [0], [0]], [[3], [1], [0], [2]], [70, 4, 70, 4]
    values, counts = np.unique(bootstrap_auc(y, score, groups, draws=800), return_counts=True)
    assert values.tolist() == [0, 0.75, 1]
    np.testing.assert_allclose(
        counts / 800, [0.25, 0.5, 0.25], atol=0.06
    )  # 3 standard errors and a bit


def test_bootstrap_without_groups_draws_rows():
    """The same rows, each its own patient: 1/2 and thirds, which whole patients cannot give."""
    values = np.unique(bootstrap_auc([[1], [1], [0], [0]], [[3], [1], [0], [2]], draws=400))
    np.testing.assert_allclose(values, [0, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1], atol=1e-12)


def test_repeated_records_of_a_patient_do_not_narrow_the_bootstrap():
    y, score = labelled(100, K=1)
    once = bootstrap_auc(y, score, draws=600)
    twice = bootstrap_auc(
        np.tile(y, (2, 1)), np.tile(score, (2, 1)), np.tile(np.arange(100), 2), draws=600
    )
    assert 0.85 < twice.std() / once.std() < 1.18  # drawn by row it would be 0.71


@pytest.mark.parametrize("rare", [1, 0], ids=["positive", "negative"])
def test_bootstrap_redraws_until_every_class_has_both_labels(rare):
    """A rare row of 40 is missing from a third of all plain draws, one of two such from half."""
    y = np.full((40, 2), 1 - rare)
    y[3, 0] = y[8, 1] = rare
    draws = bootstrap_auc(y, np.random.default_rng(0).standard_normal((40, 2)), draws=300)
    assert draws.shape == (300, 2) and np.isfinite(draws).all()


def test_bootstrap_gives_up_where_no_draw_can_have_every_class():
    """Thirty classes of one positive: a draw in a million has all.  It ends, and says NaN."""
    y, score = labelled(60, K=31)
    y[:, :30] = np.eye(60)[:, :30]
    draws = bootstrap_auc(y, score, draws=200)
    assert draws.shape == (200, 31) and np.isfinite(draws[:, 30]).all()
    is_missing = np.isnan(draws[:, :30])
    assert 0.3 < is_missing.mean() < 0.44  # (1 - 1 / 60) ** 60 = 0.365 of plain draws
    assert all(math.isnan(bound) for bound in interval(draws[:, 0]))
    low, high = interval(draws[:, 30])
    assert low < counted_auc(y[:, 30], score[:, 30]) < high


def test_bootstrap_tells_large_patient_numbers_apart():
    """Those of MIMIC-IV-ECG and of a second collection do not fit into float32."""
    y, score = labelled(40, K=1)
    patients = 10**12 + torch.arange(40)
    expected = bootstrap_auc(y, score, np.arange(40), draws=20)
    np.testing.assert_array_equal(bootstrap_auc(y, score, patients, draws=20), expected)


def test_bootstrap_of_one_positive_and_one_negative_is_the_point_value():
    assert (bootstrap_auc([[1], [0]], [[0.2], [0.7]], draws=50) == 0).all()


@pytest.mark.parametrize("levels", [None, 2], ids=["distinct", "ties"])
def test_bootstrap_of_a_single_patient_is_the_point_value(levels):
    y, score = labelled(60, K=3, levels=levels)
    expected = [counted_auc(y[:, k], score[:, k]) for k in range(3)]
    np.testing.assert_allclose(
        bootstrap_auc(y, score, np.zeros(60), draws=2), [expected, expected], rtol=1e-12
    )


def test_bootstrap_is_paired_across_scores():
    """The rows drawn do not depend on the scores, so two models can be compared draw by draw."""
    y, score = labelled(60, K=3, levels=2)
    groups = np.arange(60) // 3
    draws = bootstrap_auc(y, score, groups, draws=50, seed=5)
    assert draws.std() > 0.01
    np.testing.assert_allclose(
        bootstrap_auc(y, np.exp(score), groups, draws=50, seed=5), draws, rtol=1e-12
    )
    np.testing.assert_allclose(
        bootstrap_auc(y, -score, groups, draws=50, seed=5), 1 - draws, atol=1e-12
    )


def test_bootstrap_draws_the_same_rows_for_every_class():
    y, score = labelled(60, K=1)
    draws = bootstrap_auc(np.hstack([y, 1 - y]), np.hstack([score, -score]), draws=50)
    np.testing.assert_allclose(draws[:, 0], draws[:, 1], rtol=1e-12)


def test_bootstrap_of_an_absent_class_is_nan_and_disturbs_no_other():
    y, score = labelled(60, K=3)
    y[:, 1] = 0
    draws = bootstrap_auc(y, score, draws=50)
    assert np.isnan(draws[:, 1]).all() and np.isfinite(draws[:, [0, 2]]).all()


# ---- retrieval -----------------------------------------------------------------------------------


def noise(N, D, seed):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def ranked_retrieval(single, multi, k):
    """From all cosines in float64: how many columns are at least as near as the own one."""
    single, multi = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (single, multi))
    cosines = single @ multi.T
    rank = (cosines >= cosines.diagonal()[:, None]).sum(1)
    return {count: 100 * (rank <= count).double().mean().item() for count in k}


def test_retrieval_of_identical_embeddings_is_100_percent():
    z = noise(50, 8, 0)
    assert retrieval(z, z) == {1: 100.0, 5: 100.0, 10: 100.0}


def test_retrieval_of_cyclically_shifted_embeddings_is_0_percent():
    """Orthogonal records: one stranger is the same, the others tie with the partner at 0."""
    z = torch.eye(12)
    assert retrieval(z.roll(1, 0), z, k=(1, 5, 11, 12)) == {1: 0.0, 5: 0.0, 11: 0.0, 12: 100.0}


def test_retrieval_of_a_matrix_made_by_hand():
    """Rows are single-lead records: own products rank 1, 2, 3, 1 (in the columns 2, 1, 2, 3)."""
    cosines = torch.tensor(
        [[0.5, 0.2, -0.1, 0.4], [0.6, 0.4, 0.15, 0.3], [0.3, 0.2, 0.1, 0.0], [-0.2, -0.3, 0.0, 0.2]]
    )
    multi = torch.cat(
        [cosines.T, (1 - cosines.T.square().sum(1, keepdim=True)).sqrt()], dim=1
    )  # unit length
    single = torch.eye(4, 5)
    assert retrieval(single, multi, k=(1, 2, 3)) == {1: 50.0, 2: 75.0, 3: 100.0}
    assert retrieval(5 * single, multi * torch.tensor([[9.0], [0.1], [1.0], [30.0]]), k=(1, 2)) == {
        1: 50.0,
        2: 75.0,
    }


@pytest.mark.parametrize("N, D", [(5, 17), (6, 512), (300, 1024)])
def test_retrieval_counts_ties_against_us(N, D):
    """A collapsed encoder, one embedding for all, finds nothing, whatever the products round to."""
    for seed in range(5):
        single, collapsed = noise(N, D, seed), noise(1, D, 100 + seed).expand(N, D)
        assert retrieval(single, collapsed, k=(1, N - 1, N)) == {1: 0.0, N - 1: 0.0, N: 100.0}


@pytest.mark.parametrize("N, D", [(3, 512), (150, 64)])
def test_retrieval_of_records_that_occur_twice_is_no_hit_at_1(N, D):
    for seed in range(5):
        twice = noise(N, D, seed).repeat(2, 1)
        assert retrieval(twice, twice, k=(1, 2)) == {1: 0.0, 2: 100.0}


def test_retrieval_of_noise_is_at_chance():
    """100 of 2000 is 5 %, with a standard error of 0.49."""
    assert retrieval(noise(2000, 32, 0), noise(2000, 32, 1), k=(100,))[100] == pytest.approx(
        5, abs=2
    )


def test_retrieval_of_many_records_equals_the_whole_matrix():
    """More records than any chunk of rows may hold, and no multiple of one."""
    single = noise(4567, 8, 0)
    multi = single + noise(4567, 8, 1)
    found, expected = retrieval(single, multi), ranked_retrieval(single, multi, (1, 5, 10))
    assert 1 < expected[1] < expected[10] < 50
    assert found == pytest.approx(
        expected, abs=0.05
    )  # two records whose ranks are a matter of rounding


@pytest.mark.parametrize(
    "single, multi, k, named",
    [
        (torch.ones(4, 3), torch.ones(5, 3), (1,), "5"),
        (torch.ones(4, 3), torch.ones(4, 2), (1,), "2"),
        (torch.ones(4, 3), torch.ones(4, 3), (1, 7), "7"),
        (torch.ones(4, 3), torch.ones(4, 3), (0, 1), "k = 0, 1"),
        (torch.ones(4, 3), torch.full((4, 3), math.nan), (1,), "(?i)finite|nan"),
        (torch.full((4, 3), math.inf), torch.ones(4, 3), (1,), "(?i)finite|inf"),
    ],
)
def test_retrieval_refuses_bad_input_by_name(single, multi, k, named):
    with pytest.raises(UsageError, match=named):
        retrieval(single, multi, k=k)
