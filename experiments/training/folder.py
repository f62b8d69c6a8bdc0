"""A run's folder: who may write into it, and what lies where."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath

from experiments.files import replace_text
from experiments.training.metrics import read_metrics
from experiments.training.record import compare

# In the order in which a run is no run any more: config.json marks it as one.
_FILES = ("metrics.jsonl", "report.md", "loss.png", "wandb_run_id.txt", "config.json")


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns an absolute path; a bucket's (gs://...) is one as it stands."""
    name = os.fspath(path)
    # epath's own `resolve` makes a local path of a bucket's.
    return epath.Path(name if "://" in name else os.path.abspath(name))


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Places of a run's files. `config.json` marks a folder as a run's.

    With several processes only the first one calls the methods.

    Attributes:
        path: The folder.
        checkpoint_dir: Folder or bucket (gs://...) of the checkpoints, if they do not
            lie in the run's folder.
    """

    path: Path
    checkpoint_dir: str | None = None

    @property
    def config(self) -> Path:
        """Resolved settings and what they were applied to."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON row per step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> epath.Path:
        """Orbax checkpoints by step."""
        return epath.Path(self.checkpoint_dir or self.path / "checkpoints")

    @property
    def report(self) -> Path:
        """Written when the run has ended."""
        return self.path / "report.md"

    @property
    def model(self) -> Path:
        """Folder of the best checkpoint's model, in transformers' layout."""
        return self.path / "model"

    @property
    def predictions(self) -> Path:
        """Folder of what the best checkpoint says on test examples."""
        return self.path / "predictions"

    @property
    def tokenizer(self) -> Path:
        """Where a tokenizer that the run trains is kept."""
        return self.path / "tokenizer.json"

    def claim(self, *, resume: bool, auto_resume: bool, overwrite: bool) -> None:
        """Makes the folder ready to be written, or refuses.

        Args:
            resume: The folder holds a run that will go on.
            auto_resume: The folder may hold a run; then that will go on.
            overwrite: A run that the folder holds may be deleted, by `delete_run`, once
                all that the new one needs is known to be there.

        Raises:
            FileNotFoundError: `resume`, but there is no run.
            FileExistsError: There is a run, but nothing said what to do with it.
            OSError: The folder cannot be made or written.
        """
        # Checkpoints elsewhere may outlive the folder, on a machine that is new.
        if resume and not (self.config.exists() or self.checkpoint_dir):
            raise FileNotFoundError(
                f"{self.path} holds no run to resume: check --run-dir, --preset and "
                "--optimizer, or leave --resume out to start one."
            )
        if self.config.exists() and not (resume or auto_resume or overwrite):
            raise FileExistsError(
                f"{self.path} holds a run: --resume goes on with it, --overwrite "
                "deletes it, --run-dir chooses another folder."
            )
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass  # found out now, not after hours

    def check_restart(self, config: Mapping[str, Any], checkpoint_every: int) -> None:
        """Refuses to begin a run of which the folder has more than its beginning.

        For a run that was started before and has no checkpoint, which is so if it was
        killed early, or if checkpoints are looked for in the wrong place.

        Args:
            config: As for `write_config`, of the run that would begin.
            checkpoint_every: Steps between its checkpoints.

        Raises:
            FileExistsError: The folder is of other settings, or of a run that should
                have a checkpoint by now.
        """
        if not self.config.exists():
            return
        there = json.loads(self.config.read_text("utf-8"))
        there.pop("device", None)  # it may be another one by now
        differences = compare(there, json.loads(json.dumps(config)))
        if differences:
            raise FileExistsError(
                f"{self.path} holds a run of other settings ({'; '.join(differences)}) "
                "and no checkpoint was found to go on from: give the same settings, "
                "--checkpoint-dir included, or another --run-dir."
            )
        rows = read_metrics(self.metrics) if self.metrics.exists() else []
        if len(rows) > 2 * checkpoint_every:
            raise FileExistsError(
                f"{self.path} holds metrics up to step {rows[-1]['step']}, but "
                f"{self.checkpoints} has no checkpoint: bring them back, or start "
                "afresh with --overwrite."
            )

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes config.json, which makes the folder a run's, with what computes it.

        Raises:
            OSError: It cannot be written; one that was there stays as it is.
        """
        with self._writing():
            facts = {**config, "device": _device()}
            replace_text(self.config, json.dumps(facts, indent=2) + "\n")

    def delete_run(self) -> None:
        """Deletes the run that the folder holds; files that are no run's stay.

        Checkpoints elsewhere are deleted only if they are that run's.
        """
        if not self.config.exists():
            return
        with self._writing():
            config = json.loads(self.config.read_text("utf-8"))
            if config.get("run", {}).get("checkpoint_dir") == self.checkpoint_dir:
                self._delete_checkpoints()
            # The tokenizer stays: it is a cache that knows what text it was made from.
            for folder in (self.path / "tensorboard", self.predictions, self.model):
                shutil.rmtree(folder, ignore_errors=True)
            for name in _FILES:
                (self.path / name).unlink(missing_ok=True)

    def _delete_checkpoints(self) -> None:
        if self.checkpoint_dir is None:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        elif self.checkpoints.exists():
            # A folder of the user's choice may hold other things.
            for path in self.checkpoints.iterdir():
                if re.match(r"(damaged-)?\d+\b", path.name):
                    path.rmtree()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write the run's folder ({error.strerror}): make room or give "
                "another --run-dir",
                str(self.path),
            ) from error


def _device() -> str:
    """What losses depend on of the machine: its chip and how it multiplies."""
    precision = jax.config.jax_default_matmul_precision
    kind = jax.devices()[0].device_kind
    return kind if precision is None else f"{kind}, products {precision}"
