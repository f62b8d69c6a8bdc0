"""metrics.jsonl: flushed rows, nothing of what will be done again."""

import pytest

from experiments.training.metrics import MetricsWriter, read_metrics


def test_rows_are_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, keep_until=0) as writer:
        writer.write({"step": 1, "loss": 2.5})
        assert read_metrics(path) == [{"step": 1, "loss": 2.5}]


def test_rows_after_the_checkpoint_and_half_rows_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with MetricsWriter(path, keep_until=2) as writer:
        writer.write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_damaged_row_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
