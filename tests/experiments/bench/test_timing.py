"""Candidates take turns, ratios are of one round, and who fails is left out."""

import pytest

from experiments.bench.quartiles import Quartiles
from experiments.bench.records import timed_figures
from experiments.bench.timing import interleaved


class Machine:
    """A clock that candidates move, and a machine that slows down as it goes."""

    def __init__(self):
        self.now = 0.0
        self.slowdown = 1.0
        self.log = []

    def clock(self):
        return self.now

    def candidate(self, name, seconds, fails_at=None):
        def call(calls):
            self.log.append((name, calls))
            if fails_at is not None and len(self.log) >= fails_at:
                raise RuntimeError(f"{name} broke\nand more")
            self.now += calls * seconds * self.slowdown
            self.slowdown *= 1.01

        return call


def test_ratios_are_of_a_round_whatever_the_machine_does():
    machine = Machine()
    candidates = {
        "slow": machine.candidate("slow", 0.3),
        "fast": machine.candidate("fast", 0.1),
        "other": machine.candidate("other", 0.2),
    }
    timings = interleaved(candidates, repeats=40, clock=machine.clock)
    assert not timings.errors
    assert {name: len(s) for name, s in timings.seconds.items()} == {
        "slow": 40,
        "fast": 40,
        "other": 40,
    }
    # The machine ends more than three times slower than it began.
    assert timings.seconds["fast"][-1] > 3 * timings.seconds["fast"][0]
    for ratio in timings.ratios("slow", "fast"):
        assert ratio == pytest.approx(3, rel=0.03)
    first, second = timings.seconds["slow"], timings.seconds["fast"]
    assert timings.ratios("slow", "fast") == [a / b for a, b in zip(first, second)]
    # Each round has everyone once, and rounds differ in their order.
    names = [name for name, _ in machine.log[3:]]
    rounds = {tuple(names[i : i + 3]) for i in range(0, len(names), 3)}
    assert all(set(one) == set(candidates) for one in rounds)
    assert len(rounds) == 6


def test_one_that_takes_seconds_is_in_the_first_rounds_only():
    machine = Machine()
    candidates = {
        "slow": machine.candidate("slow", 8.0),
        "fast": machine.candidate("fast", 0.5),
    }
    timings = interleaved(candidates, repeats=6, clock=machine.clock)
    assert [len(timings.seconds[name]) for name in candidates] == [3, 6]
    ratios = timings.ratios("slow", "fast")
    assert ratios == pytest.approx([16] * 3, rel=0.03)
    assert timings.ratios("fast", "slow") == pytest.approx([1 / 16] * 3, rel=0.03)


def test_short_calls_are_timed_several_at_a_time():
    machine = Machine()
    quick = machine.candidate("quick", 0.001)
    timings = interleaved({"quick": quick}, repeats=2, clock=machine.clock)
    assert [calls for _, calls in machine.log] == [1, 20, 20]
    assert timings.seconds["quick"] == pytest.approx([0.00101, 0.00101 * 1.01])
    machine = Machine()
    nothing = machine.candidate("nothing", 0.0)
    interleaved({"nothing": nothing}, repeats=1, clock=machine.clock)
    assert [calls for _, calls in machine.log] == [1, 100]


@pytest.mark.parametrize("fails_at", [1, 7])
def test_one_that_fails_is_told_and_the_rest_goes_on(fails_at):
    machine = Machine()
    candidates = {
        "bad": machine.candidate("bad", 0.1, fails_at=fails_at),
        "good": machine.candidate("good", 0.1),
        "better": machine.candidate("better", 0.05),
    }
    timings = interleaved(candidates, repeats=5, clock=machine.clock)
    assert timings.errors == {"bad": "RuntimeError: bad broke"}
    assert timings.seconds.keys() == {"good", "better"}
    assert len(timings.seconds["good"]) == 5
    assert timings.ratios("bad", "good") is None
    assert timings.ratios("good", "bad") is None
    assert timings.ratios("good", "better") is not None


def test_repeats_of_none_are_refused():
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        interleaved({}, repeats=0)


def test_figures_are_medians_and_quartiles():
    figures = timed_figures("update", [0.001, 0.003, 0.002], [1.0, 5.0, 2.0])
    assert figures["update_ms"] == pytest.approx(2.0)
    assert figures["update_ms_low"] == pytest.approx(1.5)
    assert figures["update_ratio"] == 2.0
    assert figures["update_ratio_high"] == 3.5
    assert "update_ratio" not in timed_figures("update", [0.001], None)
    assert Quartiles.of([7.0]) == (7.0, 7.0, 7.0)
