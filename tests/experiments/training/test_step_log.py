"""Rows of steps: what is judged, and that a resume judges alike."""

from experiments.training.spikes import FEWEST
from experiments.training.step_log import StepLog

LAST = FEWEST + 20


class Rows:
    """Keeps what is written and shown."""

    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row)

    def step(self, row):
        pass


def values(step):
    """Losses that hardly move; a skipped step has one that does, as has the last."""
    skipped = step == FEWEST + 3
    return {
        "loss": 50.0 if skipped or step == LAST else 5 + 0.01 * (step % 3),
        "skipped": float(skipped),
        "update_norm": 0.0 if skipped else 1.0,
        "tokens": 8.0,
    }


def spikes(earlier):
    kept = Rows()
    log = StepLog(
        kept,
        kept,
        max_skipped=3,
        unit="tokens",
        earlier=earlier,
        throughput=lambda count, seconds: {},
    )
    for step in range(len(earlier) + 1, LAST + 1):
        log.add(step, values(step))
    log.flush()
    rows = [*earlier, *kept.rows]
    return rows, {row["step"]: row["spike"] for row in rows if "spike" in row}


def test_a_skipped_step_is_no_measure_of_the_next_ones_also_after_a_resume():
    rows, straight = spikes([])
    assert list(straight) == [LAST] and rows[FEWEST + 2]["skipped"] == 1
    assert spikes(rows[: FEWEST + 5])[1] == straight
