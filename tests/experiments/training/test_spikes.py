"""Loss spikes: found where they are, and nowhere else."""

import math

import numpy as np

from experiments.training.spikes import FEWEST, SpikeDetector


def judged(losses) -> dict[int, float]:
    detector = SpikeDetector(())
    found = {number: detector.judge(loss) for number, loss in enumerate(losses)}
    return {n: deviations for n, deviations in found.items() if deviations is not None}


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


def test_a_spike_is_found_and_measured():
    losses = list(3 + 0.05 * noise(400))
    losses[300] = 4.0
    found = judged(losses)
    assert list(found) == [300]
    assert 15 < found[300] < 25


def test_a_run_that_starts_has_none():
    # A fall like the demo's, with more noise than it has.
    for seed in range(20):
        steps = np.arange(1, 1000)
        losses = 3 + 5 * np.exp(-steps / 60) + 0.1 * noise(999, seed)
        assert not judged(losses)


def test_the_first_losses_are_not_judged():
    assert not judged([3.0] * (FEWEST - 1) + [1e6])
    assert judged([3.0] * FEWEST + [1e6])


def test_a_loss_that_does_not_move_may_start_to():
    assert not judged([2.0] * 200 + [2.0001] * 10)
    assert judged([2.0] * 200 + [2.2])


def test_of_a_new_level_only_the_first_steps_are_spikes():
    losses = np.concatenate([3 + 0.05 * noise(200), 4 + 0.05 * noise(200, 1)])
    found = judged(losses)
    assert min(found) == 200 and max(found) < 210


def test_losses_of_before_count():
    assert SpikeDetector([3.0] * FEWEST).judge(5.0) > 6
    assert SpikeDetector(()).judge(5.0) is None


def test_a_loss_of_zero_does_not_divide_by_zero():
    assert math.isfinite(judged([0.0] * 200 + [1.0])[200])
