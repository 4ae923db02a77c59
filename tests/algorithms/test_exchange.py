"""Alignment scores (Eq. 7), separation point (Eqs. 8, 9), exchange (Eq. 10), theory (App. A)."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import brentq
from scipy.stats import entropy

import dare_iql
from dare_iql import TensorBatch, alignment_score, direct_exchange, exchange, separation_point

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)
CAPS = st.sampled_from([0, 1, 32, math.inf])


def batch_of(ids):
    """Rows whose every field tells which row it is."""
    ids = torch.as_tensor(ids, dtype=torch.float32)
    fields = [torch.stack([ids, -ids, ids + 0.5], 1), torch.stack([ids / 8, -ids / 4], 1), 10 * ids]
    return TensorBatch(*fields, torch.stack([3 * ids, ids, ids], 1), ids + 100)


def ids_of(batch):
    """The rows' numbers; fails unless all fields of a row are of the same row."""
    ids = (batch.terminals - 100).tolist()
    for field, expected in zip(batch, batch_of(ids), strict=True):
        assert torch.equal(field, expected)
    return [round(i) for i in ids]


def halves(offline_scores, online_scores):
    """Batches numbered 0, 1, ... with these scores: the arguments of `exchange`."""
    n, m = len(offline_scores), len(online_scores)
    scores = [torch.as_tensor(x, dtype=torch.float32) for x in (offline_scores, online_scores)]
    return batch_of(range(n)), batch_of(range(n, n + m)), *scores


# --- Eqs. 8 and 9 ---


def separation_by_search(x, y):
    """Root of the difference of the log densities between the means, or their midpoint.

    Second result: whether both ends are clearly off a root, so that rounding cannot decide.
    """
    ends = sorted([x.mean(), y.mean()])
    if x.std() == 0 or y.std() == 0 or ends[0] == ends[1]:
        return 0.5 * sum(ends), True

    def log_density(t, mean, std):
        return -0.5 * ((t - mean) / std) ** 2 - math.log(std)

    of_x, of_y = (x.mean(), x.std()), (y.mean(), y.std())

    def difference(t):
        return log_density(t, *of_x) - log_density(t, *of_y)

    low, high = map(difference, ends)
    root = brentq(difference, *ends, xtol=1e-14) if low * high < 0 else 0.5 * sum(ends)
    return root, min(abs(low), abs(high)) > 1e-9


def random_halves(rng):
    """Scores of two halves with random sizes, shapes, places and scales."""
    draw = rng.choice([rng.normal, rng.gumbel, rng.laplace], 2)
    scale = 10.0 ** rng.uniform(-3, 3)
    return [scale * d(rng.normal(), 10 ** rng.uniform(-1.5, 1), rng.integers(2, 200)) for d in draw]


def test_separation_point_is_the_root_between_the_means_or_their_midpoint():
    rng = np.random.default_rng(0)
    n_roots = n_midpoints = n_reversed = 0
    for _ in range(1_000):
        x, y = random_halves(rng)
        expected, clear = separation_by_search(x, y)
        assert clear
        separation = separation_point(torch.from_numpy(x), torch.from_numpy(y)).item()
        assert separation == pytest.approx(expected, rel=1e-7, abs=1e-7 * abs(x.mean() - y.mean()))
        is_midpoint = math.isclose(expected, 0.5 * (x.mean() + y.mean()), rel_tol=1e-12)
        n_midpoints, n_roots = n_midpoints + is_midpoint, n_roots + (not is_midpoint)
        n_reversed += x.mean() > y.mean()
    assert min(n_roots, n_midpoints, n_reversed) > 200


def test_separation_point_of_float32_scores():
    rng = np.random.default_rng(1)
    for _ in range(300):
        x, y = (z.astype(np.float32) for z in random_halves(rng))
        expected, _ = separation_by_search(x.astype(np.float64), y.astype(np.float64))
        separation = separation_point(torch.from_numpy(x), torch.from_numpy(y))
        assert separation.dtype == torch.float32 and separation.shape == ()
        assert separation.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gap", [-5.0, 5.0])
def test_separation_point_when_variances_are_nearly_equal(gap):
    """Where the textbook's formula for the roots subtracts two nearly equal numbers."""
    x = torch.tensor([5.0, 7.0], dtype=torch.float64)
    for k in range(2, 16):
        y = gap + 6 + (x - 6) * (1 + 10.0**-k)
        expected, clear = separation_by_search(x.numpy(), y.numpy())
        assert clear and separation_point(x, y).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "x, y, expected",
    [
        ([0.0, 2.0], [5.0, 7.0], 3.5),  # equal variances
        ([5.0, 7.0], [0.0, 2.0], 3.5),  # the means in the other order
        ([1.0, 1.0], [4.0, 6.0], 3.0),  # no variance offline
        ([4.0, 6.0], [1.0, 1.0], 3.0),  # no variance online
        ([1.0, 1.0], [5.0, 5.0], 3.0),  # none in both
        ([2.0, 2.0], [2.0, 2.0], 2.0),  # one distinct value
        ([0.1] * 7, [0.1] * 3, 0.1),  # one that has no exact mean in float32
        ([2.0], [8.0], 5.0),  # one row in each half
        ([0.0, 4.0], [1.0, 3.0], 2.0),  # equal means, other variances
        ([0.0, 2.0], [-10.0, 14.0], 1.5),  # no root between the means 1 and 2
        ([-10.0, 14.0], [0.0, 2.0], 1.5),
    ],
)
def test_separation_point_special_cases(x, y, expected):
    assert separation_point(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(expected)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
FLOAT32S = hnp.arrays(np.float32, st.integers(1, 6), elements=FINITE)


@EXAMPLES
@given(FLOAT32S, FLOAT32S)
def test_separation_point_is_finite_and_between_the_means(x, y):
    separation = separation_point(torch.from_numpy(x), torch.from_numpy(y)).item()
    low, high = sorted([x.astype(np.float64).mean(), y.astype(np.float64).mean()])
    slack = 1e-6 * max(abs(low), abs(high)) + 1e-44
    assert math.isfinite(separation) and low - slack <= separation <= high + slack


# --- Eq. 10 ---


def exchange_by_hand(offline_scores, online_scores, separation, cap):
    """Row numbers of both halves after the exchange, and M: Sec. 5.3 in plain Python."""
    n = len(offline_scores)
    offline, online = list(range(n)), list(range(n, n + len(online_scores)))
    high = [i for i in range(n) if offline_scores[i] >= separation]
    low = [j for j in range(len(online)) if online_scores[j] < separation]
    high.sort(key=lambda i: -offline_scores[i])  # a stable sort: the first of equals goes first
    low.sort(key=lambda j: online_scores[j])
    m = min(len(high), len(low), cap)
    for i, j in zip(high[: int(m)], low, strict=False):
        offline[i], online[j] = online[j], offline[i]
    return offline, online, m


def score_lists(elements):
    return st.tuples(*[st.lists(elements, min_size=1, max_size=40)] * 2)


TIES = score_lists(st.integers(0, 6).map(float))
SPREAD = score_lists(st.floats(-1e3, 1e3, width=32))


@EXAMPLES
@given(TIES | SPREAD, CAPS)
def test_exchange_equals_the_slow_one(scores, cap):
    args = halves(*scores)
    offline, online, m, separation = exchange(*args, cap)
    assert separation.item() == separation_point(*args[2:]).item()
    expected = exchange_by_hand(*(x.tolist() for x in args[2:]), separation.item(), cap)
    assert (ids_of(offline), ids_of(online), m.item()) == expected


@EXAMPLES
@given(TIES | SPREAD, CAPS)
def test_exchange_moves_only_rows_of_the_wrong_side(scores, cap):
    args = halves(*scores)
    offline, online, m, separation = exchange(*args, cap)
    n, all_scores = len(scores[0]), torch.cat(args[2:])
    new_offline, new_online = ids_of(offline), ids_of(online)
    assert (len(new_offline), len(new_online)) == tuple(map(len, scores))  # halves keep their sizes
    assert sorted(new_offline + new_online) == list(range(len(all_scores)))  # as do the rows
    left = [i for i in new_online if i < n]
    came = [j for j in new_offline if j >= n]
    assert len(left) == len(came) == m <= cap
    assert all(all_scores[left] >= separation) and all(all_scores[came] < separation)
    # Nothing that stayed behind stands further on the wrong side than what left.
    stayed_offline = [i for i in new_offline if i < n]
    stayed_online = [j for j in new_online if j >= n]
    if left and stayed_offline:
        assert all_scores[left].min() >= all_scores[stayed_offline].max()
    if came and stayed_online:
        assert all_scores[came].max() <= all_scores[stayed_online].min()
    # Whoever stays keeps the place.
    assert all(new_offline[i] == i for i in stayed_offline)
    assert all(new_online[j - n] == j for j in stayed_online)


@EXAMPLES
@given(TIES | SPREAD)
def test_without_a_cap_one_half_has_no_row_left_on_the_wrong_side(scores):
    args = halves(*scores)
    offline, online, _, separation = exchange(*args)
    all_scores = torch.cat(args[2:])
    high, low = all_scores[ids_of(offline)] >= separation, all_scores[ids_of(online)] < separation
    assert not high.any() or not low.any()


@EXAMPLES
@given(TIES | SPREAD)
def test_no_pair_changes_nothing(scores):
    args = halves(*scores)
    offline, online, m, _ = exchange(*args, 0)
    assert m == 0
    for before, after in zip([*args[0], *args[1]], [*offline, *online], strict=True):
        assert torch.equal(before, after)


@EXAMPLES
@given(TIES | SPREAD, CAPS, st.randoms(use_true_random=False))
def test_exchange_of_permuted_batches_gives_the_same_scores(scores, cap, random):
    results = []
    for pair in (scores, [random.sample(x, len(x)) for x in scores]):
        args = halves(*pair)
        *batches, m, separation = exchange(*args, cap)
        after = [sorted(torch.cat(args[2:])[ids_of(b)].tolist()) for b in batches]
        results.append((*after, m.item(), separation.item()))
    assert results[0] == results[1]


def test_the_control_exchanges_as_many_rows_whatever_their_scores():
    """--exchange random: the same M, every row of a half equally often."""
    torch.manual_seed(0)
    args = halves([0.0, 1.0, 2.0, 8.0, 9.0, 9.5], [10.0, 11.0, 12.0, 3.0, 4.0, 1.0])
    *_, m, separation = exchange(*args)
    assert 0 < m < 6
    left = torch.zeros(12)
    for _ in range(600):
        offline, online, m_random, same = exchange(*args, at_random=True)
        assert (m_random, same) == (m, separation)
        went = [i for i in ids_of(online) if i < 6] + [j for j in ids_of(offline) if j >= 6]
        assert len(went) == 2 * m
        left[went] += 1
    deviation = math.sqrt(600 * (m / 6) * (1 - m / 6))
    assert ((left - 600 * m / 6).abs() < 4 * deviation).all()
    assert exchange(*args, 1, at_random=True)[2] == 1  # the cap holds


def test_statistics_of_scores_that_tell_the_halves_apart_and_of_others():
    torch.manual_seed(0)
    near, far = torch.rand(128), 2 + torch.rand(128)
    stats = dare_iql.score_statistics(near, far)
    assert stats["auc"] == 1 and exchange(*halves(near, far))[2] == 0
    assert stats["mu_online"] == far.mean() and stats["sigma_offline"] == near.std(correction=0)
    # Of halves that are apart half of the rows stand on the wrong side once labels are permuted.
    chance = [dare_iql.score_statistics(near, far)["exchanged_by_chance"] for _ in range(50)]
    assert torch.stack(chance).mean() == pytest.approx(64, abs=3)
    assert dare_iql.score_statistics(far, near)["auc"] == 0
    same = [dare_iql.score_statistics(*torch.randn(2, 128)) for _ in range(50)]
    assert torch.stack([x["auc"] for x in same]).mean() == pytest.approx(0.5, abs=0.02)


def test_one_distinct_score_exchanges_nothing():
    args = halves([1.5] * 5, [1.5] * 5)
    offline, online, m, separation = exchange(*args)
    assert m == 0 and separation == 1.5
    assert ids_of(offline) == [0, 1, 2, 3, 4] and ids_of(online) == [5, 6, 7, 8, 9]


@EXAMPLES
@given(TIES | SPREAD)
def test_direct_exchange_sorts_the_whole_batch(scores):
    args = halves(*scores)
    n, all_scores = len(scores[0]), torch.cat(args[2:])
    offline, online, moved, cut = direct_exchange(*args)
    new_offline, new_online = ids_of(offline), ids_of(online)
    assert sorted(new_offline + new_online) == list(range(len(all_scores)))
    expected = sorted(all_scores.tolist())
    assert sorted(all_scores[new_offline].tolist()) == expected[:n]
    assert sorted(all_scores[new_online].tolist()) == expected[n:]
    assert moved == sum(i >= n for i in new_offline) == sum(i < n for i in new_online)
    assert cut == expected[n]
    # Of equal scores at the cut the offline rows stay, so that no row moves without need.
    must_stay = sum(s < cut for s in scores[0])
    may_stay = sum(s == cut for s in scores[0])
    room = n - sum(s < cut for s in all_scores.tolist())
    assert moved == n - must_stay - min(may_stay, room)


def test_no_score_is_read_by_the_host():
    """Tensors on the meta device have shapes and no values: to read a value is an error."""
    offline, online = (TensorBatch(*(f.to("meta") for f in batch_of(range(n)))) for n in (6, 4))
    scores = [alignment_score(b.actions, torch.empty(len(b.rewards), 3, 2, device="meta"))
              for b in (offline, online)]  # fmt: skip
    for function in (exchange, direct_exchange):
        *after, m, separation = function(offline, online, *scores)
        assert m.shape == separation.shape == () and m.is_meta and separation.is_meta
        for before, batch in zip((offline, online), after, strict=True):
            assert [f.shape for f in batch] == [f.shape for f in before]


# --- Eq. 7 ---


@pytest.fixture
def actions():
    """Actions [7, 3] and reference actions [7, 5, 3]."""
    rng = np.random.default_rng(2)
    return torch.from_numpy(rng.normal(size=(7, 3))), torch.from_numpy(rng.normal(size=(7, 5, 3)))


def divergence_by_hand(align, a, a_hat):
    if align == "softmax_kl":
        return entropy(*(np.exp(x) / np.exp(x).sum() for x in (a.numpy(), a_hat.numpy())))
    unit = torch.eye(len(a), dtype=a.dtype)
    p, q = (torch.distributions.MultivariateNormal(x, unit) for x in (a, a_hat))
    return torch.distributions.kl_divergence(p, q).item()


@pytest.mark.parametrize("align", dare_iql.CHOICES["align"])
@pytest.mark.parametrize("m", [1, 5])
def test_alignment_score_is_the_soft_minimum_of_divergences(actions, align, m):
    a, references = actions[0], actions[1][:, :m]
    scores = alignment_score(a, references, align)
    assert scores.shape == (7,)
    for i in range(len(a)):
        divergences = [divergence_by_hand(align, a[i], a_hat) for a_hat in references[i]]
        expected = -math.log(sum(math.exp(-d) for d in divergences) / m)
        assert scores[i].item() == pytest.approx(expected, rel=1e-12)
        if m == 1:
            assert scores[i].item() == pytest.approx(divergences[0], rel=1e-12)


def test_gaussian_alignment_is_half_the_squared_distance(actions):
    a, references = actions
    expected = 0.5 * ((a - references[:, 0]) ** 2).sum(-1)
    torch.testing.assert_close(alignment_score(a, references[:, :1]), expected)


@pytest.mark.parametrize("align", dare_iql.CHOICES["align"])
def test_order_of_reference_actions_does_not_matter(actions, align):
    a, references = actions
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        scores = alignment_score(a, references[:, order], align)
        torch.testing.assert_close(scores, alignment_score(a, references, align))


def test_softmax_divergence_is_taken_from_the_action_to_the_reference():
    a, a_hat = torch.tensor([[1.0, -1.0]]), torch.tensor([[[0.5, 0.9]]])
    forward = alignment_score(a, a_hat, "softmax_kl").item()
    assert forward == pytest.approx(divergence_by_hand("softmax_kl", a[0], a_hat[0, 0]), rel=1e-6)
    backward = alignment_score(a_hat[0], a[None], "softmax_kl").item()
    assert forward != pytest.approx(backward, rel=0.1)


# --- App. A ---


def cdf(scores, t):
    """Empirical distribution function of scores at each of t."""
    return np.searchsorted(np.sort(scores), t, side="right") / len(scores)


def cdf_difference(offline, online, t):
    """D(t) = F_off(t) - F_on(t)."""
    return cdf(offline, t) - cdf(online, t)


def amplitude(offline, online):
    """A = sup D - inf D; D is 0 at both ends and jumps at the scores only."""
    d = np.append(cdf_difference(offline, online, np.concatenate([offline, online])), 0.0)
    return d.max() - d.min()


def exchange_scores(offline, online, cap=math.inf):
    """Scores of both halves after `exchange`, with M and separation."""
    batches = [TensorBatch(*[torch.from_numpy(x)[:, None]] * 5) for x in (offline, online)]
    scores = (torch.from_numpy(offline), torch.from_numpy(online))
    *halves_after, m, separation = exchange(*batches, *scores, cap)
    return *(b.rewards.flatten().numpy() for b in halves_after), int(m), separation.item()


EQUAL_HALVES = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[hnp.arrays(np.float64, n, elements=st.integers(0, 60))] * 2)
)


@EXAMPLES
@given(EQUAL_HALVES, CAPS)
def test_exchange_raises_the_cdf_difference(scores, cap):
    """What is true in place of Theorem 1: a swap adds 2/N to D on [d_y, d_x), since both halves
    change; Eq. 22 counts one of them.
    """
    offline, online = scores
    n, t = len(offline), np.arange(-1.0, 62.0)
    *after, m, separation = exchange_scores(offline, online, cap)
    d_x, d_y = np.sort(offline)[::-1][:m], np.sort(online)[:m]
    swaps = ((d_y[:, None] <= t) & (t < d_x[:, None])).sum(0)
    change = cdf_difference(*after, t) - cdf_difference(offline, online, t)
    np.testing.assert_allclose(change, 2 * swaps / n, atol=1e-12)
    below_tau = np.nextafter(separation, -np.inf)
    change = cdf_difference(*after, below_tau) - cdf_difference(offline, online, below_tau)
    assert change == pytest.approx(2 * m / n)
    if (cdf_difference(offline, online, t) >= 0).all():
        assert amplitude(*after) >= amplitude(offline, online) - 1e-12


def gaussian_scores(rng, n, largest_ratio):
    """Gaussian scores with mu_off < mu_on and standard deviations of this ratio at most."""
    std = largest_ratio ** rng.uniform(-1, 1)
    return rng.normal(0, 1, n), rng.normal(rng.uniform(0, 2), std, n)


def squared_distances(rng, n):
    """Half the squared distances of Gaussian actions from a point, further away online."""
    offline, online = rng.normal(size=(2, n, 6))
    return 0.5 * (offline**2).sum(1), 0.5 * ((online + rng.uniform(0.1, 1)) ** 2).sum(1)


@pytest.mark.parametrize(
    "draw, largest_share_of_claim, largest_share_of_fall",
    [
        (lambda rng, n: gaussian_scores(rng, n, 2), 0, 0),
        (lambda rng, n: gaussian_scores(rng, n, 10), 0.02, 0.15),
        (squared_distances, 0, 0),
    ],
    ids=["gaussian, sigmas within 2", "gaussian, sigmas within 10", "squared distances"],
)
def test_theorem_1_fails_for_the_exchange_of_eq_10(
    draw, largest_share_of_claim, largest_share_of_fall
):
    """A' <= A - M/N is the claim for mu_off < mu_on; but Eq. 10 moves the halves apart on d."""
    rng, n, changes, steps = np.random.default_rng(3), 128, [], []
    while len(changes) < 300:
        offline, online = draw(rng, n)
        *after, m, _ = exchange_scores(offline, online)
        if m > 0 and offline.mean() < online.mean():
            changes.append(amplitude(*after) - amplitude(offline, online))
            steps.append(m / n)
    claim = np.mean(np.array(changes) <= -np.array(steps) + 1e-12)
    falls = np.mean(np.array(changes) < -1e-12)
    print(f"A' <= A - M/N in {claim:.1%} of {len(changes)} batches, A' < A in {falls:.1%}")
    assert claim <= largest_share_of_claim and falls <= largest_share_of_fall


def test_lemma_1_has_a_counterexample():
    """x = 6 lies at or above the largest D, y = 1 at or below the smallest; A rises."""
    offline, online = np.array([2.0, 3, 3, 6]), np.array([1.0, 4, 4, 7])
    t = np.concatenate([offline, online])
    d = cdf_difference(offline, online, t)
    assert (t[d.argmax()], t[d.argmin()], amplitude(offline, online)) == (3, 1, 0.75)
    eq_22 = d - 0.25 * (t >= 6) + 0.25 * (t >= 1)  # counts one half only
    assert max(eq_22.max(), 0) - min(eq_22.min(), 0) == 0.75  # does not fall by 1/N either
    assert amplitude(np.array([2.0, 3, 3, 1]), np.array([6.0, 4, 4, 7])) == 1


def test_accepted_exchanges_are_at_most_the_amplitude_times_n():
    """Proposition 1, on the longest sequences of exchanges that each lower A by 1/N or more."""
    rng, n, lengths = np.random.default_rng(4), 4, []

    def longest(offline, known):
        if offline not in known:
            rest = frozenset(range(2 * n)) - offline
            lower = amplitude_of(offline) - 1 / n + 1e-12
            swaps = (offline - {x} | {y} for x in offline for y in rest)
            known[offline] = max(
                (1 + longest(s, known) for s in swaps if amplitude_of(s) <= lower), default=0
            )
        return known[offline]

    for _ in range(5):
        scores = rng.integers(0, 6, 2 * n) if rng.random() < 0.3 else rng.normal(size=2 * n)
        amplitudes = {}
        for rows in map(frozenset, combinations(range(2 * n), n)):
            online = [j for j in range(2 * n) if j not in rows]
            amplitudes[rows] = amplitude(scores[list(rows)], scores[online])
        amplitude_of, known = amplitudes.__getitem__, {}
        for rows in amplitudes:
            lengths.append(longest(rows, known))
            assert lengths[-1] <= math.floor(amplitude_of(rows) * n + 1e-9)
    assert max(lengths) >= 2


@EXAMPLES
@given(EQUAL_HALVES, CAPS, st.floats(0.01, 0.99), st.floats(0.01, 1e3), st.integers(0, 9))
def test_mixed_residual_changes_by_at_most_2_b_m_over_n(scores, cap, alpha, bound, seed):
    """Proposition 2, from what a swap changes: E by (2 alpha - 1) (|r_y| - |r_x|) / N."""
    n = len(scores[0])
    residuals = np.random.default_rng(seed).uniform(-bound, bound, 2 * n)
    args = halves(*scores)
    offline, online, m, _ = exchange(*args, cap)
    after = np.array(ids_of(offline)), np.array(ids_of(online))

    def mixed_residual(offline_rows, online_rows):
        of = [np.abs(residuals[rows]).mean() for rows in (offline_rows, online_rows)]
        return alpha * of[0] + (1 - alpha) * of[1]

    change = mixed_residual(*after) - mixed_residual(np.arange(n), np.arange(n, 2 * n))
    came, left = (np.abs(residuals[[i for i in rows if (i < n) == away]]).sum()
                  for rows, away in zip(after, (False, True), strict=True))  # fmt: skip
    slack = 1e-9 * bound
    assert change == pytest.approx((2 * alpha - 1) * (came - left) / n, abs=slack)
    assert abs(change) <= abs(2 * alpha - 1) * bound * m / n + slack <= 2 * bound * m / n + slack
