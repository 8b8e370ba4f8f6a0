"""Properties of the solvers over families of gradients, against brute force and closed forms."""

import importlib
import re
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from gradient_families import FAMILIES, Case, case
from scipy.optimize import nnls
from trl_ext_data_regularization.solvers import RULES, Problem, Rule, Solution, count, squared_distance, subset

LR = 0.3
# Gradients are float64; Gram matrices square their condition number, so 1e-7 of |t| is what can be asked for.
REL = 1e-7

families = pytest.mark.parametrize("family", FAMILIES)
rules = pytest.mark.parametrize("name", RULES)
projections = pytest.mark.parametrize("name", ["span", "cone", "hull", "capped"])


def solve(c: Case, name: str, frac: float = 0.5, radius: float = 0.7) -> Solution:
    return Rule(name, frac, radius).solve(c.problem, c.norm, LR)


def subset_means(c: Case, k: int):
    """The token-mean gradient of every k-subset, from its definition."""
    for chosen in combinations(range(len(c.tokens)), k):
        rows = list(chosen)
        yield rows, c.G[rows].sum(0) * c.tokens.sum() / c.tokens[rows].sum()


@families
@pytest.mark.parametrize("frac", [0.3, 0.5, 1.0])
def test_topk_keeps_the_subset_with_the_largest_sum_of_scores(family, frac):
    for seed in range(5):
        c = FAMILIES[family](seed)
        k = max(1, int(len(c.tokens) * frac))
        best, mean = max(subset_means(c, k), key=lambda pair: float((c.G[pair[0]] @ c.t).sum()))
        solution = solve(c, "topk", frac)
        assert solution.weights.nonzero().flatten().tolist() == best
        torch.testing.assert_close(c.update(solution), mean)


@families
def test_filter_drops_what_works_against_the_target(family):
    for seed in range(5):
        c = FAMILIES[family](seed)
        negative = (c.G @ c.t) < 0
        assert torch.equal(solve(c, "filter", 1.0).weights == 0, negative)
        torch.testing.assert_close(solve(c, "filter", 0.0).weights, torch.ones(len(c.tokens), dtype=torch.float64))


def test_filter_drops_the_most_negative_share():
    s = torch.tensor([3.0, -1.0, -4.0, 0.0, -2.0, -3.0])
    solution = Rule("filter", 0.6).solve(Problem(s, torch.ones(6)), torch.tensor(1.0), LR)
    assert (solution.weights == 0).tolist() == [False, False, True, False, False, True]  # int(0.6 x 4) = 2
    torch.testing.assert_close(solution.weights.max(), torch.tensor(6 / 4))


def test_all_samples_against_the_target_leave_a_zero_update():
    solution = Rule("filter", 1.0).solve(Problem(-torch.rand(4) - 1, torch.ones(4)), torch.tensor(1.0), LR)
    assert torch.equal(solution.weights, torch.zeros(4))


@families
def test_second_order_is_the_greedy_choice(family):
    for seed in range(5):
        c = FAMILIES[family](seed)
        chosen: list[int] = []
        for _ in range(count(len(c.tokens), 0.5)):
            # From gradients: what a further sample gains once the step -lr sum_S g has been taken.
            moved = c.t - LR * c.G[chosen].sum(0) if chosen else c.t
            gain = c.G @ moved
            gain[chosen] = -torch.inf
            chosen.append(int(gain.argmax()))
        assert solve(c, "second-order").weights.nonzero().flatten().tolist() == sorted(chosen)


@families
def test_second_order_is_topk_where_a_warm_up_begins(family):
    """At lr = 0 nothing that was chosen moves the weights, and the scores alone tell samples apart."""
    for seed in range(5):
        c = FAMILIES[family](seed)
        first = Rule("second-order", 0.5).solve(c.problem, c.norm, 0.0)
        assert torch.equal(first.weights, solve(c, "topk").weights)


@families
def test_span_leaves_a_residual_orthogonal_to_every_general_gradient(family):
    for seed in range(5):
        c = FAMILIES[family](seed)
        residual = c.update(solve(c, "span")) - c.t
        assert float((c.G @ residual).abs().max()) <= REL * float(c.G.norm() * c.t.norm())
        torch.testing.assert_close(
            c.update(solve(c, "span")),
            c.G.T @ torch.linalg.lstsq(c.G.T, c.t, driver="gelsd").solution,
            rtol=1e-6,
            atol=REL * float(c.t.norm()),
        )


@families
def test_distances_are_ordered(family):
    for seed in range(10):
        c = FAMILIES[family](seed)
        k = count(len(c.tokens), 0.5)
        best = min(float((mean - c.t).norm()) for _, mean in subset_means(c, k))
        distances = [c.distance(solve(c, name)) for name in ("span", "cone", "hull", "capped")] + [best]
        assert all(a <= b + REL * float(c.t.norm()) for a, b in pairwise(distances)), distances


@families
@pytest.mark.parametrize("name", ["cone", "hull", "capped"])
def test_convex_projections_satisfy_the_variational_inequality(family, name):
    """u is the projection of t exactly if <t - u, v - u> <= 0 for all v in the set; linear, so its vertices suffice."""
    for seed in range(5):
        c = FAMILIES[family](seed)
        solution = solve(c, name)
        u, n = c.update(solution), len(c.tokens)
        means = c.G * (c.tokens.sum() / c.tokens).unsqueeze(1)
        if name == "cone":
            vertices = [torch.zeros_like(c.t), *(1e3 * means)]
        elif name == "hull":
            vertices = list(means)
        else:
            vertices = [mean for _, mean in subset_means(c, count(n, 0.5))]
        assert (solution.weights >= 0).all()
        for v in vertices:
            assert float((c.t - u) @ (v - u)) <= 1e-6 * float(c.t.norm() * (v - u).norm() + c.t @ c.t)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_capped_simplex_contains_every_subset_mean_and_no_more_than_it_must(k):
    """With the target at a subset's mean, the distance is zero; with equal lengths no weight exceeds T_tot/(k tau)."""
    c = case(3, 6, 40, unequal=True)
    for _, mean in subset_means(c, k):
        at = replace(c, t=mean)
        assert at.distance(solve(at, "capped", k / 6 + 1e-9)) <= 1e-6 * float(mean.norm())
    equal = case(4, 6, 40)
    assert float(solve(equal, "capped", k / 6 + 1e-9).weights.max()) <= 6 / k + 1e-9


@families
@projections
def test_projections_are_idempotent(family, name):
    for seed in range(5):
        c = FAMILIES[family](seed)
        once = c.update(solve(c, name))
        twice = replace(c, t=once)
        torch.testing.assert_close(twice.update(solve(twice, name)), once, rtol=1e-6, atol=1e-6 * float(c.t.norm()))


@families
@pytest.mark.parametrize("radius", [0.0, 0.5, 100.0])
def test_ball_is_the_closest_point_of_the_ball(family, radius):
    c = FAMILIES[family](0)
    mean = c.G.sum(0)
    rho = radius * mean.norm()
    u = c.update(solve(c, "ball", radius=radius))
    away = c.t - mean
    expected = c.t if away.norm() <= rho else mean + rho * away / away.norm()
    torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-12 * float(c.t.norm()))


@families
@rules
def test_relabelling_the_samples_relabels_the_weights(family, name):
    c = FAMILIES[family](1)
    order = torch.randperm(len(c.tokens), generator=torch.Generator().manual_seed(0))
    moved = Case(c.G[order], c.t, c.tokens[order])
    torch.testing.assert_close(
        moved.update(solve(moved, name)), c.update(solve(c, name)), rtol=1e-6, atol=1e-6 * float(c.t.norm())
    )


@families
@rules
def test_layers_are_solved_alike_together_and_alone(family, name):
    cases = [FAMILIES[family](seed) for seed in range(3)]
    cases = [replace(c, tokens=cases[0].tokens) for c in cases]
    stacked = Problem(
        torch.stack([c.problem.s for c in cases]), cases[0].tokens, torch.stack([c.problem.K for c in cases])
    )
    together = Rule(name, 0.5, 0.7).solve(stacked, torch.stack([c.norm for c in cases]), LR)
    for i, c in enumerate(cases):
        alone = solve(c, name)
        torch.testing.assert_close(together.weights[i], alone.weights, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(together.target[i], alone.target, rtol=1e-6, atol=1e-9)


@families
@pytest.mark.parametrize("name", ["full", "topk", "second-order"])
def test_keeping_everything_is_the_plain_update_to_the_bit(family, name):
    c = FAMILIES[family](2)
    assert torch.equal(solve(c, name, frac=1.0).weights, torch.ones_like(c.problem.s))


@families
@rules
def test_distance_by_the_gram_matrix_is_the_distance(family, name):
    c = FAMILIES[family](3)
    solution = solve(c, name)
    by_gram = squared_distance(c.problem, solution, c.norm)
    torch.testing.assert_close(
        by_gram, torch.tensor(c.distance(solution) ** 2, dtype=torch.float64), rtol=1e-6, atol=1e-9 * float(c.norm)
    )


@pytest.mark.parametrize("name", ["full", "target", "filter", "span", "cone", "hull", "ball"])  # not by a count of n
def test_a_sample_without_labels_changes_nothing(name):
    c = case(5, 6, 12, unequal=True)
    nothing = torch.zeros(1, 12, dtype=torch.float64)
    more = Case(torch.cat([c.G, nothing]), c.t, torch.cat([c.tokens, torch.tensor([0])]))
    torch.testing.assert_close(more.update(solve(more, name)), c.update(solve(c, name)), rtol=1e-6, atol=1e-7)


def test_a_window_without_any_label_gives_a_zero_update():
    problem = Problem(torch.zeros(3), torch.zeros(3), torch.zeros(3, 3))
    for name in ("topk", "filter", "second-order", "span", "cone", "hull", "capped"):
        solution = Rule(name, 1.0).solve(problem, torch.tensor(1.0), LR)
        assert torch.isfinite(solution.weights).all(), name
    assert torch.equal(subset(problem, torch.ones(3, dtype=torch.bool)).weights, torch.zeros(3))


def test_duplicated_samples_share_their_weight():
    """A singular Gram matrix is ordinary: windows contain duplicates, and n may exceed the dimensions."""
    c = case(6, 4, 9)
    double = Case(torch.cat([c.G, c.G]) / 2, c.t, torch.cat([c.tokens, c.tokens]))
    for name in ("span", "cone", "hull"):
        torch.testing.assert_close(double.update(solve(double, name)), c.update(solve(c, name)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@rules
def test_a_layer_whose_scores_are_not_finite_gets_weights_of_nan(name, bad):
    """NaN has no place in an order, so nothing may be kept by one; the other layer chooses as if it were alone."""
    c = case(7, 6, 12, unequal=True)
    s, K = c.problem.s.repeat(2, 1), c.problem.K.repeat(2, 1, 1)
    s[0, 3] = bad
    norms = torch.stack([torch.tensor(bad).double(), c.norm])
    found = Rule(name, 0.5, 0.7).solve(Problem(s, c.tokens, K), norms, LR)
    if name in ("full", "target"):  # the scores have no say
        assert torch.isfinite(found.weights).all()
    else:
        assert found.weights[0].isnan().all()
        assert found.target[0].isnan()
    torch.testing.assert_close(found.weights[1], solve(c, name).weights)


@pytest.mark.parametrize("name", ["cone", "hull", "capped"])
def test_samples_that_are_not_used_weigh_nothing_at_all(name):
    """Rounding must not pass for a small weight: such samples would count as kept."""
    for seed in range(20):
        c = case(seed, 8, 5, unequal=True)
        weights = solve(c, name).weights
        assert ((weights == 0) | (weights > 1e-9)).all()
    c = case(0, 8, 400)
    opposed = replace(c, t=-c.G.sum(0))
    assert (opposed.problem.s < 0).all()
    if name == "cone":
        assert torch.equal(solve(opposed, name).weights, torch.zeros(8, dtype=torch.float64))


@rules
def test_a_rule_states_its_formula_its_shapes_and_its_source(name):
    """Module first, formula first; extensions say that they are none of the paper's."""
    module = importlib.import_module(f"trl_ext_data_regularization.solvers.{name.replace('-', '_')}")
    (function,) = [f for f in vars(module).values() if getattr(f, "__module__", "") == module.__name__ and f.__doc__][
        -1:
    ]
    assert re.search(r"=|min", module.__doc__.partition("\n")[0])
    assert "arXiv:2605.07063" in function.__doc__ or "An extension, not in the paper" in function.__doc__
    assert ("[extension]" in module.__doc__) == ("An extension, not in the paper" in function.__doc__)
    assert re.search(r"token mean|g_i|m_i", function.__doc__), "whose gradients the weights multiply"


# -- gradients of very different lengths, as training leaves them ----------------------------------------------------

RATIOS = [1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12]
SIZES = [(1, 3), (2, 2), (8, 3), (8, 16), (33, 11), (64, 128)]
"""Samples and dimensions; with fewer dimensions than samples, Gram matrices are singular."""


def uneven_cases(ratio: float, n: int, dimensions: int, equal: bool = False):
    """Token means of lengths between 1 and `ratio`, and targets as long as the shortest, as the longest and between."""
    generator = torch.Generator().manual_seed(n + dimensions)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    lengths = ratio ** torch.rand(n, generator=generator, dtype=torch.float64)
    lengths[0], lengths[-1] = 1.0, ratio
    tokens = torch.full((n,), 7) if equal else torch.randint(1, 30, (n,), generator=generator)
    common = draw(dimensions)
    means = (draw(n, dimensions) + common) * lengths.unsqueeze(1)
    for length in (ratio, ratio**0.5, 1.0):
        t = (draw(dimensions) + common) * length
        yield Case(means * (tokens / tokens.sum()).unsqueeze(1), t, tokens)


def closest_in_cone(rays, t):
    """Distance of t (P,) to the cone of the rows of `rays` (m, P): Lawson and Hanson, without a Gram matrix."""
    lengths = rays.norm(dim=1, keepdim=True)
    return nnls((rays / lengths).T.numpy(), t.numpy(), maxiter=100 * len(rays))[1]


def closest_in_hull(points, t):
    """Distance of t (P,) to the hull of the rows of `points` (m, P), as that of (0, 1) to the cone over points - t."""
    unit = float(t.norm())
    rays = torch.cat([(points - t) / unit, torch.ones(len(points), 1, dtype=torch.float64)], 1)
    lengths = rays.norm(dim=1)
    apex = torch.zeros(rays.shape[1], dtype=torch.float64)
    apex[-1] = 1.0
    x = (
        torch.from_numpy(nnls((rays / lengths.unsqueeze(1)).T.numpy(), apex.numpy(), maxiter=100 * len(rays))[0])
        / lengths
    )
    return float((x / x.sum() @ points - t).norm())


def closest_in_span(rays, t):
    """Distance of t (P,) to the span of the rows of `rays` (m, P), by a singular value decomposition of the rows."""
    _, values, right = torch.linalg.svd(rays / rays.norm(dim=1, keepdim=True), full_matrices=False)
    basis = right[values > 1e-11 * values[0]]
    return float((t - basis.T @ (basis @ t)).norm())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", ["span", "cone", "hull"])
def test_projections_reach_the_closest_point_whatever_the_lengths(name, ratio):
    for n, dimensions in SIZES:
        for c in uneven_cases(ratio, n, dimensions):
            means = c.G * (c.tokens.sum() / c.tokens).unsqueeze(1)
            closest = {"span": closest_in_span, "cone": closest_in_cone, "hull": closest_in_hull}[name](means, c.t)
            excess = c.distance(solve(c, name)) - closest
            # The root of rounding in a Gram matrix: 1e-8 of |t| or of the distance.
            assert float(excess) / max(closest, float(c.t.norm())) <= 2e-6, (n, dimensions)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_capped_simplex_is_reached_whatever_the_lengths(ratio):
    """With equal lengths in tokens it is the hull of the means of all k-subsets."""
    for n, dimensions, k in ((2, 2, 1), (8, 3, 4), (8, 16, 3), (33, 11, 2)):
        for c in uneven_cases(ratio, n, dimensions, equal=True):
            solution = solve(c, "capped", k / n + 1e-9)
            vertices = torch.stack([mean for _, mean in subset_means(c, k)])
            closest = closest_in_hull(vertices, c.t)
            excess = c.distance(solution) - closest
            assert float(excess) / max(closest, float(c.t.norm())) <= 2e-6, (n, dimensions, k)
            share = solution.weights / n
            assert float(share.sum()) == pytest.approx(1)
            assert float(share.max() * k) <= 1 + max(1e-6, 1e-13 / ratio)  # tolerances are relative to the longest


@pytest.mark.parametrize("ratio", RATIOS)
def test_distances_are_ordered_whatever_the_lengths(ratio):
    for n, dimensions in SIZES:
        for c in uneven_cases(ratio, n, dimensions):
            distances = [c.distance(solve(c, name)) for name in ("span", "cone", "hull", "capped", "topk")]
            assert all(a <= b + 2e-6 * max(b, float(c.t.norm())) for a, b in pairwise(distances)), (n, distances)


@pytest.mark.parametrize("ratio", RATIOS)
def test_subsets_and_the_ball_follow_their_definitions_whatever_the_lengths(ratio):
    for n, dimensions in SIZES:
        for c in uneven_cases(ratio, n, dimensions):
            k, scores = count(n, 0.5), c.G @ c.t
            assert set(solve(c, "topk").weights.nonzero().flatten().tolist()) == set(scores.topk(k).indices.tolist())
            assert torch.equal(solve(c, "filter", 1.0).weights != 0, scores >= 0)
            chosen: list[int] = []
            for _ in range(k):
                gain = c.G @ (c.t - LR * c.G[chosen].sum(0))
                gain[chosen] = -torch.inf
                chosen.append(int(gain.argmax()))
            assert set(solve(c, "second-order").weights.nonzero().flatten().tolist()) == set(chosen)
            mean, away = c.G.sum(0), c.t - c.G.sum(0)
            rho = 0.7 * mean.norm()
            expected = c.t if away.norm() <= rho else mean + rho * away / away.norm()
            error = (c.update(solve(c, "ball")) - expected).norm()
            assert float(error / max(c.t.norm(), mean.norm())) <= 1e-7


def test_a_cone_of_rays_of_very_different_lengths_is_solved():
    """As training leaves them: learnt samples have gradients 1e-5 as long. The conditions of optimality, ray by ray."""
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        n = 8
        lengths = 10.0 ** -(6 * torch.rand(n, generator=generator))
        common = torch.randn(12, generator=generator)
        G = (torch.randn(n, 12, generator=generator) + common) * lengths.unsqueeze(1)
        t = 1e-4 * (torch.randn(12, generator=generator) + common)
        problem = Problem((G @ t).double(), torch.randint(4, 6, (n,), generator=generator), (G @ G.T).double())
        weights = Rule("cone", 1.0).solve(problem, (t @ t).double(), LR).weights
        slack = (problem.K @ weights - problem.s) / problem.K.diagonal().sqrt() / t.norm()  # >= 0, and 0 where w > 0
        assert float(slack.min()) >= -1e-5, seed
        assert float((slack * (weights > 0)).abs().max()) <= 1e-5, seed
