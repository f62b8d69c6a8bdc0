"""A run's folder: who may write into it, and what lies where."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Places of a run's files. `config.json` marks a folder as a run's."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved settings and what they were applied to."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON row a step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints by step."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """Written when the run has ended."""
        return self.path / "report.md"

    @property
    def tokenizer(self) -> Path:
        """Where a tokenizer that the run trains is kept."""
        return self.path / "tokenizer.json"

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Makes the folder ready to be written, or refuses.

        Args:
            resume: The folder holds a run that will go on.
            overwrite: A run that the folder holds may be deleted, by `delete_run`, once
                all that the new one needs is known to be there.

        Raises:
            FileNotFoundError: `resume`, but there is no run.
            FileExistsError: There is a run, but neither `resume` nor `overwrite`.
        """
        if resume:
            if not self.config.exists():
                raise FileNotFoundError(
                    f"{self.path} holds no run to resume: check --run-dir, --preset "
                    "and --optimizer, or leave --resume out to start one."
                )
            return
        if self.config.exists():
            if not overwrite:
                raise FileExistsError(
                    f"{self.path} holds a run: --resume goes on with it, --overwrite "
                    "deletes it, --run-dir chooses another folder."
                )
        self.path.mkdir(parents=True, exist_ok=True)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes config.json, which makes the folder a run's."""
        self.config.write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def delete_run(self) -> None:
        """Deletes the run that the folder holds; files that are no run's stay."""
        if not self.config.exists():
            return
        # The tokenizer stays: it is a cache that knows what text it was made from.
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for name in ("metrics.jsonl", "report.md", "loss.png", "config.json"):
            (self.path / name).unlink(missing_ok=True)
