"""Verdicts: the worst setting decides, and what is missing or broken is not reached."""

import math

import pytest

from experiments.bench.records import Row
from experiments.bench.targets import verdicts


def judged(rows, start):
    (verdict,) = [v for v in verdicts(rows) if v.what.startswith(start)]
    return verdict


def row(part, optimizer, layout="stacked", error=None, **figures):
    return Row(part, "demo", optimizer, layout, figures=figures, error=error)


STEADY = "steady update, galore"


def test_nothing_measured_is_neither_reached_nor_not():
    assert {v.word for v in verdicts([])} == {"not measured"}
    assert len(verdicts([])) == 14
    assert all(v.value is None and v.reached is None for v in verdicts([]))


def test_the_worst_setting_decides():
    rows = [
        row("update", "galore", "list", update_ratio=0.5),
        row("update", "galore", "stacked", update_ratio=0.9),
        row("update", "natural_galore", update_ratio=7.0),
        row("refresh", "galore", update_ratio=7.0, refresh_ratio=0.05),
    ]
    verdict = judged(rows, STEADY)
    assert (verdict.word, verdict.value) == ("reached", 0.9)
    assert "stacked" in verdict.where
    rows.append(row("update", "galore", "list", update_ratio=0.91))
    verdict = judged(rows, STEADY)
    assert (verdict.word, verdict.value) == ("not reached", 0.91)
    assert judged(rows, "refresh, galore").word == "reached"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_reached(bad):
    rows = [
        row("update", "galore", "list", update_ratio=bad),
        row("update", "galore", update_ratio=0.5),
    ]
    assert judged(rows, STEADY).word == "not reached"


def test_a_failure_is_not_reached_and_says_why():
    rows = [
        row("update", "galore", "list", update_ratio=0.5),
        row("update", "galore", error="OutOfMemory: 9 GB"),
    ]
    verdict = judged(rows, STEADY)
    assert verdict.word == "not reached"
    assert "OutOfMemory: 9 GB" in verdict.where


def test_energy_has_a_lower_bound():
    rows = [
        row("energy", "default projector", captured_mean=0.99),
        row("energy", "default projector", captured_mean=0.96),
        row("energy", "1 iteration", captured_mean=0.1),
    ]
    assert judged(rows, "energy").value == 0.96
    assert judged(rows, "energy").word == "not reached"
    assert judged(rows[:1], "energy").word == "reached"


def test_compiling_is_judged_from_the_fewest_to_the_most_layers():
    rows = [
        row("compile", "galore", layers=n, compile_s=s, instructions=100.0)
        for n, s in ((8.0, 2.0), (64.0, 2.2), (16.0, 9.0))
    ]
    assert judged(rows, "compile_s").value == pytest.approx(1.1)
    assert judged(rows, "compile_s").word == "reached"
    assert judged(rows, "instructions").value == 1
    rows.append(row("compile", "galore", "list", layers=1.0, compile_s=0.1))
    assert judged(rows, "compile_s").value == pytest.approx(1.1)
    rows.append(row("compile", "natural_galore", error="killed"))
    assert judged(rows, "compile_s").word == "not reached"


def test_memory_is_compared_with_both_peers():
    rows = [
        row("memory", "natural_galore", memory_mb=3.0),
        row("memory", "adamw", memory_mb=4.0),
        row("memory", "optax_galore", memory_mb=2.0),
    ]
    assert judged(rows, "memory of a training step, natural_galore / adamw").reached
    other = judged(rows, "memory of a training step, natural_galore / optax_galore")
    assert (other.value, other.word) == (1.5, "not reached")
    alone = judged(rows[:1], "memory of a training step, natural_galore / adamw")
    assert alone.word == "not measured"
