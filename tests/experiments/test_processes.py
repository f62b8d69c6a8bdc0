"""Two processes with two devices each train as one process with four does."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from experiments.pretrain import main
from experiments.training.metrics import read_metrics
from tests.experiments.cluster import Cluster

STEPS = 12
PRETRAIN = "experiments.pretrain"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Four shards of JSON lines, whose documents are read as streams."""
    folder = tmp_path_factory.mktemp("shards")
    dice = random.Random(0)
    for shard in range(4):
        texts = [
            " ".join(
                dice.choice("some words that a model can learn".split())
                for _ in range(40)
            )
            for _ in range(30)
        ]
        lines = (json.dumps({"text": f"{shard} {i} {t}"}) for i, t in enumerate(texts))
        (folder / f"train-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "held.txt").write_text("some words that a model can learn " * 20)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "a.txt").write_text(
        "some words that a model can learn " * 9
    )
    (folder / "tokenizer" / "b.txt").write_text("and others " * 9)
    return folder


@pytest.fixture(scope="module")
def tokenizer(shards) -> Path:
    from experiments.data.tokenizer import train_bpe

    path = shards / "tokenizer.json"
    texts = [p.read_text() for p in sorted((shards / "tokenizer").iterdir())]
    train_bpe(texts, 280, path)
    return path


def arguments(shards: Path, tokenizer: Path, run_dir: Path, *more: str) -> list[str]:
    command = (
        f"--stream --streams 4 --shuffle-buffer 8 --sequences packed "
        f"--sequence-length 16 --batch-size 8 --steps {STEPS} --eval-every 4 "
        "--checkpoint-every 2 --rank 4 --update-proj-gap 3 --history 3 "
        "--validation-tokens 128 --model.vocab-size 280 --model.hidden-size 16 "
        "--model.intermediate-size 24 --model.num-heads 2 --model.num-layers 2 "
        "--mesh.data 2 --mesh.fsdp 2"
    )
    paths = ["--data", f"{shards}/train-*.jsonl", "--validation-data"]
    paths += [f"{shards}/held.txt", "--tokenizer", f"{tokenizer}"]
    return [*paths, "--run-dir", str(run_dir), *command.split(), *more]


def losses(run_dir: Path) -> np.ndarray:
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    values = [[row["loss"], row["gradient_norm"], row["tokens"]] for row in rows]
    evaluated = [row["validation_loss"] for row in rows if "validation_loss" in row]
    return np.array([*np.ravel(values), *evaluated])


@pytest.fixture(scope="module")
def two_processes(shards, tokenizer, tmp_path_factory) -> Path:
    """The folder of an undisturbed run in two processes."""
    folder = tmp_path_factory.mktemp("two")
    with Cluster(
        PRETRAIN, arguments(shards, tokenizer, folder / "run"), folder
    ) as cluster:
        assert cluster.wait() == [0, 0], cluster.output()
    assert (folder / "run" / "report.md").exists()
    # One process speaks, but for what the CPU's collectives say.
    assert "validation" not in cluster.logs[1].read_text()
    assert "validation" in cluster.logs[0].read_text()
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1  # and writes
    return folder / "run"


def test_two_processes_train_as_one(shards, tokenizer, two_processes, tmp_path):
    assert main(arguments(shards, tokenizer, tmp_path / "one")) == 0
    np.testing.assert_allclose(
        losses(two_processes), losses(tmp_path / "one"), rtol=2e-4
    )


def test_stopped_and_killed_they_end_where_the_undisturbed_do(
    shards, tokenizer, two_processes, tmp_path
):
    run_dir = tmp_path / "run"
    command = arguments(shards, tokenizer, run_dir, "--auto-resume")
    with Cluster(PRETRAIN, command, tmp_path / "stopped") as cluster:
        cluster.until_step(run_dir, 2)
        cluster.processes[1].terminate()
        # One process was asked, both agree on a step, save and end.
        assert cluster.wait() == [143, 143], cluster.output()
        assert "Saved step" in cluster.logs[0].read_text()
    done = len(read_metrics(run_dir / "metrics.jsonl"))
    with Cluster(PRETRAIN, command, tmp_path / "killed") as cluster:
        cluster.until_step(run_dir, done + 1)
        cluster.processes[1].kill()
    assert done < len(read_metrics(run_dir / "metrics.jsonl")) < STEPS
    with Cluster(PRETRAIN, command, tmp_path / "resumed") as cluster:
        assert cluster.wait() == [0, 0], cluster.output()
    np.testing.assert_array_equal(losses(run_dir), losses(two_processes))


def test_a_mistake_that_one_process_meets_ends_both(
    shards, tokenizer, two_processes, tmp_path
):
    command = arguments(shards, tokenizer, two_processes)
    with Cluster(PRETRAIN, command, tmp_path) as cluster:
        assert cluster.wait() == [1, 1], cluster.output()
    assert "--overwrite" in cluster.logs[0].read_text()
    assert "process 0: " in cluster.logs[1].read_text()
