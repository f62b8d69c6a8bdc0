"""The runs that a study needs: the same rule for every arm."""

import math

import pytest

from experiments.study.arms import parse_arms
from experiments.study.pretraining import PRETRAINING
from experiments.study.tuning import Budget, needed


@pytest.fixture(scope="module")
def arm():
    (arm,) = parse_arms(["a=--learning-rate 1"], [], PRETRAINING)
    return arm


def test_a_tie_goes_to_the_lower_rate_whatever_ended_first(arm):
    budget = Budget((0.5, 1.0, 2.0), 0, (0, 1))
    for factors in ((0.5, 1.0, 2.0), (2.0, 1.0, 0.5)):
        results = {arm.run(factor, 0): 3.0 for factor in factors}
        assert needed(arm, budget, results)[-1] == arm.run(0.5, 1)


def rates(runs, seed=0) -> list[float]:
    return [run.learning_rate for run in runs if run.seed == seed]


def play(arm, budget, loss_of, losses=None) -> tuple[list, dict]:
    """Does what is needed until nothing is left."""
    losses = {} if losses is None else losses
    while missing := [run for run in needed(arm, budget, losses) if run not in losses]:
        losses |= {run: loss_of(run.learning_rate) for run in missing}
    return needed(arm, budget, losses), losses


def distance_from(best):
    return lambda rate: abs(math.log2(rate / best))


def test_rates_on_the_first_seed_then_the_best_on_the_others(arm):
    budget = Budget((2, 0.5, 1), extensions=1, seeds=(7, 0, 3))
    assert rates(needed(arm, budget, {}), seed=7) == [0.5, 1, 2]
    assert not rates(needed(arm, budget, {}))
    runs, _ = play(arm, budget, distance_from(1.1))
    assert rates(runs, 7) == [0.5, 1, 2]  # inside: no more tries
    assert rates(runs, 0) == rates(runs, 3) == [1]
    assert len(runs) == budget.runs == 5


@pytest.mark.parametrize(
    ("best", "extensions", "tried", "chosen"),
    [
        (100, 0, [0.5, 1, 3], 3),
        (100, 1, [0.5, 1, 3, 9], 9),
        (100, 2, [0.5, 1, 3, 9, 27], 27),
        (8, 2, [0.5, 1, 3, 9, 27], 9),  # at the edge until 27 is worse
        (4, 3, [0.5, 1, 3, 9], 3),  # inside after one: no other
        (0.01, 2, [0.125, 0.25, 0.5, 1, 3], 0.125),
    ],
)
def test_where_the_best_is_at_the_edge_more_is_tried(
    arm, best, extensions, tried, chosen
):
    budget = Budget((0.5, 1, 3), extensions, seeds=(0, 1))
    runs, _ = play(arm, budget, distance_from(best))
    assert rates(runs) == tried
    assert rates(runs, 1) == [chosen]


def test_one_factor_has_no_edge(arm):
    runs, _ = play(arm, Budget((1.0,), 5, (0, 1)), distance_from(100))
    assert rates(runs) == rates(runs, 1) == [1]


def test_rates_of_earlier_commands_count_and_are_not_run_again(arm):
    _, losses = play(arm, Budget((1, 4), 0, (0,)), distance_from(4))
    runs, _ = play(arm, Budget((0.5, 1, 2), 0, (0, 1)), distance_from(4), losses)
    assert rates(runs) == [0.5, 1, 2]
    assert rates(runs, 1) == [4]


def test_divergence_is_infinitely_bad_and_sends_the_search_down(arm):
    budget = Budget((0.5, 1, 2), 1, (0, 1))
    runs, _ = play(arm, budget, lambda rate: math.inf)
    assert rates(runs) == [0.25, 0.5, 1, 2]
    assert not rates(runs, 1)
    runs, _ = play(arm, budget, lambda rate: math.inf if rate > 1 else -rate)
    assert rates(runs, 1) == [1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"factors": ()},
        {"factors": (1, 1)},
        {"factors": (0, 1)},
        {"seeds": ()},
        {"seeds": (-1,)},
        {"extensions": -1},
    ],
)
def test_a_budget_that_makes_no_study_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        Budget(**wrong)
