"""What readers of the plots rely on: looks, names that can be read, gaps."""

import math

import pytest
from matplotlib.figure import Figure

from experiments.study import plots
from experiments.study.summary import Summary
from tests.experiments.study.test_records import record


def test_an_arm_looks_the_same_whatever_the_others_lose():
    arms = [f"arm{number}" for number in range(20)]
    found = plots.looks(arms)
    assert len(set(found.values())) == 20
    assert plots.looks(arms[::-1]) == found


def test_names_stand_beside_their_points_and_not_on_each_other():
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    points = [(f"some_method_{n}", 1 + 0.01 * n, 3.0, "black") for n in range(4)]
    points.append(("at_the_right_edge", 2.0, 3.0, "black"))
    axes.plot([x for _, x, _, _ in points], [y for _, _, y, _ in points], "o")
    plots._label(axes, points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [name for name, *_ in points]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert box.x1 < axes.bbox.x1


@pytest.mark.parametrize("bad", [None, 1e9])
def test_runs_that_diverge_leave_the_others_readable(tmp_path, bad):
    good = (record(seed=0, losses=(4.0, 3.0)), record(seed=1, losses=(4.1, 3.1)))
    half = record(seed=2, losses=(bad, 3.2))
    lost = record(losses=(None, None))
    summaries = [
        Summary("good", {1.0: 3.0}, (*good, half)),
        Summary("lost", {1.0: math.inf}, (lost,)),
    ]
    assert len(plots.draw(summaries, tmp_path)) == len(list(tmp_path.iterdir())) == 4
    low, high = plots._later(summaries[:1])
    assert low < 3.0 and 4.0 < high < 5
    assert plots.draw(summaries[1:], tmp_path) == []
