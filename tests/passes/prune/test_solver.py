"""The solver of budgets: no choice of widths that is within the limit loses less."""

import itertools
import random

import numpy as np
import pytest

from fxopt.passes.prune.costs import Grid, Product, total
from fxopt.passes.prune.regions import Measured
from fxopt.passes.prune.solver import cheapest, greedy, solve
from fxopt.passes.prune.widths import Size


def made_up(seed):
    """Return losses and terms over four families: products of one to three sizes, sums of sizes, and tables."""
    draw = random.Random(seed)
    options = [draw.randint(2, 4) for _ in range(4)]
    counts = [tuple(sorted(draw.sample(range(1, 30), count))) for count in options]
    single = [Size(0, ((family, counts[family]),)) for family in range(4)]
    joined = Size(draw.randint(0, 4), tuple((family, counts[family]) for family in (0, 1, 2)))
    pair = Size(3, tuple((family, counts[family]) for family in (2, 3)))
    factors = [
        (single[0], single[1]),
        (joined, single[3]),
        (joined, single[0]),
        (single[2], single[2]),
        (joined, joined),
    ]
    factors += [(joined, pair), (joined,), (), (single[3],)]
    terms = [Product(f"p{n}", draw.uniform(0.1, 2), each) for n, each in enumerate(factors)]
    table = np.array([[draw.uniform(0, 300) for _ in range(options[3])] for _ in range(options[1])])
    terms.append(Measured("table", (1, 3), table))
    losses = [(*sorted((draw.random() for _ in range(count - 1)), reverse=True), 0.0) for count in options]
    return losses, terms


def best_by_trying(losses, terms, limit):
    choices = itertools.product(*(range(len(each)) for each in losses))
    return min(
        (loss_of(losses, choice) for choice in choices if total(terms, choice) <= limit * (1 + 1e-9)), default=None
    )


def loss_of(losses, choice):
    return sum(row[at] for row, at in zip(losses, choice, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_the_solver_finds_what_trying_all_finds(seed):
    losses, terms = made_up(seed)
    full = total(terms, [len(each) - 1 for each in losses])
    for share in (0.35, 0.5, 0.8):
        want = best_by_trying(losses, terms, share * full)
        found = solve(losses, terms, share * full, seconds=60)
        assert (found is None) == (want is None)
        if found is None:
            assert share == 0.35
            continue
        assert found.solver == "HiGHS"
        assert total(terms, found.choice) <= share * full * (1 + 1e-9)
        assert loss_of(losses, found.choice) == pytest.approx(
            want, rel=2e-4, abs=1e-9
        )  # the solver stops at a gap of 1e-4


@pytest.mark.parametrize("seed", range(12))
def test_the_greedy_choice_is_within_the_limit_and_cannot_be_widened(seed):
    losses, terms = made_up(seed)
    limit = 0.5 * total(terms, [len(each) - 1 for each in losses])
    choice = greedy(losses, terms, limit)
    assert choice is not None
    assert total(terms, choice) <= limit * (1 + 1e-9)
    best = best_by_trying(losses, terms, limit)
    assert loss_of(losses, choice) >= best - 1e-9
    for family, row in enumerate(losses):
        wider = (*choice[:family], choice[family] + 1, *choice[family + 1 :])
        assert choice[family] == len(row) - 1 or total(terms, wider) > limit


def test_times_of_a_concatenation_are_linear_between_the_points_of_its_grid():
    counts = (1, 2, 4, 8)
    size = Size(0, tuple((family, counts) for family in range(3)))
    term = Measured("cat", (Grid(size, (3, 12, 24)), 3), np.array([[1.0, 2.0], [10.0, 40.0], [12.0, 44.0]]))
    losses = [(3.0, 2.0, 1.0, 0.0)] * 3 + [(2.5, 0.0)]
    assert term.value((0, 0, 0, 0)) == 1.0
    assert term.value((2, 2, 2, 1)) == 40.0
    assert term.value((3, 2, 2, 1)) == pytest.approx(40 + 4 / 3)  # 16 of the way from 12 to 24
    for limit in (1.5, 5.0, 9.0, 11.0, 30.0, 41.5):
        found = solve(losses, [term], limit, seconds=60)
        assert found is not None
        assert loss_of(losses, found.choice) == pytest.approx(best_by_trying(losses, [term], limit), abs=1e-9)


def test_without_time_for_the_solver_steps_are_taken():
    losses, terms = made_up(0)
    limit = 0.4 * total(terms, [len(each) - 1 for each in losses])
    found = solve(losses, terms, limit, seconds=0.0)
    assert found is not None
    assert found.solver == "greedy, since HiGHS found nothing in 0 s"
    assert found.choice == greedy(losses, terms, limit)


def test_what_is_out_of_reach_has_no_solution():
    losses, terms = made_up(1)
    least = total(terms, cheapest([len(each) for each in losses], terms, seconds=60))
    assert least == pytest.approx(min(total(terms, c) for c in itertools.product(*(range(len(r)) for r in losses))))
    assert solve(losses, terms, 0.99 * least, seconds=60) is None
    assert greedy(losses, terms, 0.5 * least) is None
