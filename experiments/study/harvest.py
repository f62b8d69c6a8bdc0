"""What a run's folder and its settings have to say, as a record."""

import functools
import importlib.metadata
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
from optax.transforms import PartitionState

import ngalore_jax as ng
from experiments.study.arms import Arm
from experiments.study.runs import Record, Run
from experiments.study.subject import Shared, Subject
from experiments.training.folder import RunFolder
from experiments.training.metrics import read_metrics
from experiments.training.optimizer import matrix_labels

_ROOT = Path(__file__).parents[2]


class RunError(Exception):
    """A run failed, for another reason than that its loss is not finite."""


def harvest(
    arm: Arm, run: Run, path: Path, exit_code: int, subject: Subject, shared: Shared
) -> Record:
    """Reads what a run that has ended left in its folder.

    Args:
        arm: What it is a run of.
        run: The run.
        path: Its folder; what it has printed lies beside it, with suffix .log.
        exit_code: Of the command.
        subject: What it trains.
        shared: What the study has read.

    Raises:
        RunError: It did not end well, nor by a loss that is not finite; or it has read
            something else than the study.
    """
    folder = RunFolder(path)
    said = _error(log_of(path))
    diverged = said if exit_code == 1 and "not finite" in said else None
    if exit_code and diverged is None:
        raise RunError(said or f"ended with code {exit_code}; see {log_of(path)}")
    if diverged is None and not folder.report.exists():
        raise RunError(f"ended without a report; see {log_of(path)}")
    fingerprints = subject.fingerprints(arm.config, shared)
    config = json.loads(folder.config.read_text("utf-8"))
    read = subject.fingerprints_read(config)
    if any(fingerprints[name] != found for name, found in read.items()):
        raise RunError("it has read another text: a file has changed since the start.")
    weights = weigh(arm, subject)
    return Record(
        run=run,
        settings=arm.settings(run, fingerprints),
        curve=_curve(read_metrics(folder.metrics), subject),
        state_bytes=weights["state_bytes"],
        parameters=weights["parameters"],
        versions=versions() | {"device": config.get("device", "unknown")},
        diverged=diverged,
    )


def log_of(path: Path) -> Path:
    """Returns the file that takes what the run in a folder prints."""
    return path.with_name(f"{path.name}.log")


def delete_weights(path: Path) -> None:
    """Deletes the checkpoints and the model of a run whose record is written."""
    folder = RunFolder(path)
    for weights in (folder.checkpoints, folder.model):
        shutil.rmtree(weights, ignore_errors=True)


@functools.cache
def weigh(arm: Arm, subject: Subject) -> dict[str, dict[str, int]]:
    """Returns bytes of optimizer state and number of parameters, abstractly.

    Each of `all`, and of the `matrices` alone, which are left to the arm's method,
    with kernels that it freezes. Among the numbers, that of the state's values.
    """
    parts = subject.parts(arm.config)
    params = jax.eval_shape(lambda: parts.init_params(jax.random.key(0)))
    state = jax.eval_shape(parts.optimizer.init, params)
    matrices = [
        node.inner_states["matrix"]
        for node in jax.tree.leaves(state, is_leaf=_is_partition)
        if _is_partition(node)
    ]
    labels = jax.tree.leaves(matrix_labels(params))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    pairs = zip(labels, sizes, strict=True)
    return {
        "state_bytes": {
            "all": ng.state_bytes(state),
            "matrices": ng.state_bytes(matrices),
        },
        "parameters": {
            "all": sum(sizes),
            "matrices": sum(size for label, size in pairs if label == "matrix"),
            "state": sum(leaf.size for leaf in jax.tree.leaves(state)),
        },
    }


def versions() -> dict[str, str]:
    """Returns the versions of what losses depend on, with the commit if there is one.

    The commit's name ends with `-dirty` where files differed from it.
    """
    found = {
        name: importlib.metadata.version(name) for name in ("jax", "optax", "flax")
    }
    described = subprocess.run(
        "git describe --always --dirty --abbrev=40 --exclude=*".split(),
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if described.returncode == 0:
        found["commit"] = described.stdout.strip()
    return found


def _curve(rows: list[dict[str, Any]], subject: Subject) -> dict[str, list[Any]]:
    columns = {
        subject.unit: [int(sum_) for sum_ in _running_sum(rows, subject.unit)],
        "seconds": _running_sum(rows, "seconds"),
    }
    evaluated = [at for at, row in enumerate(rows) if "validation_loss" in row]
    kept = subject.columns(rows[evaluated[0]]) if evaluated else ["validation_loss"]
    return {
        "step": [rows[at]["step"] for at in evaluated],
        **{name: [column[at] for at in evaluated] for name, column in columns.items()},
        **{name: [rows[at][name] for at in evaluated] for name in kept},
    }


def _running_sum(rows: list[dict[str, Any]], name: str) -> list[float]:
    # Null in a step whose loss or gradient was not finite.
    return list(itertools.accumulate(row[name] or 0 for row in rows))


def _error(log: Path) -> str:
    """The message that a run has ended with, empty without one."""
    if not log.exists():
        return ""
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    messages = [line for line in lines if re.match(r"error: |[\w.]+Error: ", line)]
    return messages[-1].removeprefix("error: ") if messages else ""


def _is_partition(node: Any) -> bool:
    return isinstance(node, PartitionState)
