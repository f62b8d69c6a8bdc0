"""Resumes a run on other meshes: `python -m experiments.mesh_test --help`.

A tiny run is made on eight devices of this CPU. From its checkpoint halfway it then
goes on in copies, on other layouts and numbers of devices, whose losses are compared
with those of the run that was left alone.
"""

import contextlib
import dataclasses
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments import pretrain
from experiments.kill_test import load, rows, write_texts
from experiments.training.folder import RunFolder

_STEPS = 20
_DIFFERENCE = "largest relative difference of a loss"
_FIRST = (1, 8, 1)
_OTHERS = (
    (1, 8, 1),
    (8, 1, 1),
    (2, 4, 1),
    (2, 2, 2),
    (1, 2, 4),
    (1, 4, 1),
    (2, 1, 2),
    (1, 1, 1),
)
_TINY = (
    "--sequence-length 16 --batch-size 8 --eval-every 10 --checkpoint-every 10 "
    "--rank 4 --update-proj-gap 4 --history 3 --validation-tokens 200 "
    "--model.vocab-size 304 --model.hidden-size 32 --model.intermediate-size 48 "
    f"--model.num-heads 4 --model.num-layers 2 --steps {_STEPS}"
)


@dataclasses.dataclass(frozen=True)
class MeshTestConfig:
    """Go on with a run on other meshes and compare.

    Losses that agree to rounding are of the same batches.

    Attributes:
        json: File for the results.
    """

    json: Path | None = None


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code is 0 if all losses agree."""
    config = tyro.cli(MeshTestConfig, args=args, prog="python -m experiments.mesh_test")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    with tempfile.TemporaryDirectory() as folder:
        results = compare(Path(folder))
    if config.json is not None:
        config.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    table = Table(*results[0])
    for row in results:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    return 0 if all(row[_DIFFERENCE] < 1e-4 for row in results) else 1


def compare(work: Path) -> list[dict[str, Any]]:
    """Makes the runs in `work` and returns the rows of the table."""
    write_texts(work / "texts")
    whole = RunFolder(work / "whole")
    _train(work, whole, _FIRST)
    return [_resumed(work, whole, mesh) for mesh in _OTHERS]


def _resumed(work: Path, whole: RunFolder, mesh: tuple[int, ...]) -> dict[str, Any]:
    folder = RunFolder(work / "x".join(map(str, mesh)))
    shutil.copytree(whole.path, folder.path)
    shutil.rmtree(folder.checkpoints / str(_STEPS))
    _train(work, folder, mesh, "--resume")
    ours, theirs = rows(folder)[_STEPS // 2 :], rows(whole)[_STEPS // 2 :]
    pairs = [
        (row[name], other[name])
        for row, other in zip(ours, theirs, strict=True)
        for name in ("loss", "validation_loss")
        if name in other
    ]
    (arrays, _), (expected, _) = load(folder, _STEPS), load(whole, _STEPS)
    return {
        "data x fsdp x tensor": " x ".join(map(str, mesh)),
        _DIFFERENCE: float(f"{max(abs(a - b) / abs(b) for a, b in pairs):.1e}"),
        "end bit for bit equal": all(
            a.tobytes() == b.tobytes() for a, b in zip(arrays, expected, strict=True)
        ),
    }


def _train(work: Path, folder: RunFolder, mesh: tuple[int, ...], *more: str) -> None:
    axes = [f"--mesh.{axis}" for axis in ("data", "fsdp", "tensor")]
    sizes = [word for pair in zip(axes, map(str, mesh), strict=True) for word in pair]
    paths = ["--data", f"{work}/texts/*.txt", "--run-dir", str(folder.path)]
    with contextlib.redirect_stdout(io.StringIO()):
        code = pretrain.main([*paths, *_TINY.split(), *sizes, *more])
    if code:
        raise RuntimeError(f"the run on {mesh} failed; its error is above.")


if __name__ == "__main__":
    sys.exit(main())
