"""Two processes with two devices each train as one process with four does."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.pretrain import main
from experiments.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 12
TIMEOUT = 240


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


class Cluster:
    """The command in two processes with two devices each; a context manager."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"{index}.log" for index in range(2)]
        flags = "--xla_force_host_platform_device_count=2"
        self.processes = []
        for index, log in enumerate(self.logs):
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
            command = [sys.executable, "-m", "experiments.pretrain", *arguments]
            with log.open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [*command, "--mesh.distributed"],
                        cwd=ROOT,
                        env=env,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self) -> list[int]:
        """Exit codes."""
        return [process.wait(TIMEOUT) for process in self.processes]

    def until_step(self, run_dir: Path, step: int) -> None:
        """Waits until a step's row is written."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            with contextlib.suppress(FileNotFoundError, ValueError):
                if any(
                    row["step"] >= step
                    for row in read_metrics(run_dir / "metrics.jsonl")
                ):
                    return
            assert time.monotonic() < deadline and self.alive(), self.output()
            time.sleep(0.005)

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def output(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()


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
    with Cluster(arguments(shards, tokenizer, folder / "run"), folder) as cluster:
        assert cluster.wait() == [0, 0], cluster.output()
    assert (folder / "run" / "report.md").exists()
    # One process speaks, but for what the CPU's collectives say.
    assert "validation" not in cluster.logs[1].read_text()
    assert "validation" in cluster.logs[0].read_text()
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
    with Cluster(command, tmp_path / "stopped") as cluster:
        cluster.until_step(run_dir, 2)
        cluster.processes[1].terminate()
        # One process was asked, both agree on a step, save and end.
        assert cluster.wait() == [143, 143], cluster.output()
        assert "Saved step" in cluster.logs[0].read_text()
    done = len(read_metrics(run_dir / "metrics.jsonl"))
    with Cluster(command, tmp_path / "killed") as cluster:
        cluster.until_step(run_dir, done + 1)
        cluster.processes[1].kill()
    assert done < len(read_metrics(run_dir / "metrics.jsonl")) < STEPS
    with Cluster(command, tmp_path / "resumed") as cluster:
        assert cluster.wait() == [0, 0], cluster.output()
    np.testing.assert_array_equal(losses(run_dir), losses(two_processes))


def test_a_mistake_that_one_process_meets_ends_both(
    shards, tokenizer, two_processes, tmp_path
):
    command = arguments(shards, tokenizer, two_processes)
    with Cluster(command, tmp_path) as cluster:
        assert cluster.wait() == [1, 1], cluster.output()
    assert "--overwrite" in cluster.logs[0].read_text()
    assert "process 0: " in cluster.logs[1].read_text()
