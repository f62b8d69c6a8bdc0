"""Checkpoints: train state, data position and what the run is, by Orbax."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grain
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from experiments.training.state import TrainState, abstract_like


class ResumeError(ValueError):
    """There is no checkpoint to go on from, or it is another run's."""


class Checkpointer:
    """Saves and restores a run in one folder; a context manager.

    Saving is asynchronous and atomic: a checkpoint is there as a whole or not at
    all, and leaving the context waits for the one under way.
    """

    def __init__(
        self, directory: Path, *, keep: int, identity: Mapping[str, Any]
    ) -> None:
        """Opens `directory`, made if absent.

        Args:
            directory: Folder of the checkpoints.
            keep: Newest checkpoints to keep.
            identity: What the run is, as JSON objects: saved with every checkpoint;
                restoring for another identity is refused.
        """
        self.directory = directory
        self._identity = dict(identity)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep),
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None without any."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, batches: grain.DatasetIterator
    ) -> None:
        """Starts to save after `step` updates; a step that is saved stays as it is."""
        if step == self.latest_step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(batches),
                identity=ocp.args.JsonSave(self._identity),
            ),
            force=True,
        )

    def restore(self, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """Restores the newest checkpoint.

        Args:
            state: A state of the same shapes; its shardings are those of the result.
            batches: Is set to the saved position.

        Raises:
            ResumeError: There is no checkpoint, or it belongs to a run of another
                identity.
        """
        step = self.latest_step
        if step is None:
            raise ResumeError(
                f"{self.directory} holds no checkpoint to go on from: start the run "
                "again with --overwrite instead of --resume."
            )
        # Read alone and first: with another model Orbax would complain about shapes.
        saved = self._manager.restore(
            step, args=ocp.args.Composite(identity=ocp.args.JsonRestore())
        )
        self._check_identity(saved["identity"])
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_like(state)),
                data=grain.checkpoint.CheckpointRestore(batches),
            ),
        )
        return restored["state"]

    def wait(self) -> None:
        """Waits until the save under way is on disk; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def __enter__(self) -> Self:
        """Return the checkpointer."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the save under way, then close."""
        self._manager.close()

    def _check_identity(self, saved: Mapping[str, Any]) -> None:
        before, now = _flatten(saved), _flatten(self._identity)
        differences = [
            f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if differences:
            raise ResumeError(
                f"{self.directory} belongs to another run ({'; '.join(differences)}). "
                "Give the same settings to go on, or another --run-dir."
            )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
