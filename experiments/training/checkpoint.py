"""Checkpoints: train state, data position and what the run is, by Orbax.

A checkpoint is a folder named by its step, with two items: `state`, and `record`, a
JSON object of the run's identity and config, the position in the data of every
process, and fingerprints of state and record.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from experiments.errors import PassingError
from experiments.training.distributed import gather, is_first
from experiments.training.fingerprint import fingerprint, structure
from experiments.training.folder import absolute
from experiments.training.preservation import LowestObjective
from experiments.training.quiet import quiet_checkpoints, settle
from experiments.training.reader import DamagedError, Reader
from experiments.training.record import compare, first_line, seal
from experiments.training.state import TrainState, abstract_like, give_up


class ResumeError(ValueError):
    """There is no checkpoint to go on from, or it is another run's."""


class SaveError(OSError):
    """A checkpoint could not be written."""


class BucketError(SaveError, PassingError):
    """A checkpoint could not be written to storage behind a network."""


class Positioned(Protocol):
    """Batches whose position can be saved; see `experiments.data.batches.Batches`."""

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Goes to the position that all processes together have saved."""
        ...


class Checkpointer:
    """Saves and restores a run in one folder; a context manager.

    Saving is asynchronous and atomic: a checkpoint is there as a whole or not at
    all, and leaving the context waits for the one under way. The newest checkpoints
    are kept, and the best one. With several processes, all
    of them make the same calls.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int,
        identity: Mapping[str, Any],
        config: Mapping[str, Any],
        report: Callable[[str], None],
    ) -> None:
        """Opens `directory`, made if absent.

        Args:
            directory: Folder of the checkpoints, also in a bucket (gs://...).
            keep: Newest checkpoints to keep.
            identity: What the run is, as JSON objects: saved with every checkpoint;
                restoring for another identity is refused.
            config: The resolved config, saved with every checkpoint.
            report: Tells the user what is wrong with a checkpoint that is passed over.

        Raises:
            OSError: The folder cannot be made or read.
        """
        self.directory = absolute(directory)
        self._identity = dict(identity)
        self._config = dict(config)
        self._report = report
        self._best = LowestObjective()
        newest = checkpoint_managers.LatestN(keep)
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                        (newest, self._best)
                    ),
                    # What a killed save has left.
                    cleanup_tmp_directories=True,
                ),
            )
        except OSError as error:
            advice = "give another --checkpoint-dir or --run-dir"
            message = f"cannot keep checkpoints there ({error.strerror}): {advice}"
            raise OSError(error.errno, message, str(self.directory)) from error
        self._reader = Reader(self.directory)
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._reader.close)
        self._read_objectives()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None without any."""
        return self._manager.latest_step()

    def start(
        self,
        state: TrainState,
        batches: Positioned,
        *,
        resume: bool = False,
        auto_resume: bool = False,
    ) -> TrainState:
        """Returns the state that a run begins with: a restored one, or `state`.

        Args:
            state: The initial state; its shardings are those of the result. Where
                another is restored, its arrays are given up first.
            batches: Is set to the saved position, if a state is restored.
            resume: A checkpoint must be there.
            auto_resume: A checkpoint may be there.

        Raises:
            FileExistsError: Neither is asked for, but there are checkpoints.
            ResumeError: There is no checkpoint to resume, or none that can be read, or
                they belong to a run of another identity.
        """
        if self.latest_step is not None and (resume or auto_resume):
            return self.restore(give_up(state), batches)
        if self.latest_step is not None:
            raise FileExistsError(
                f"{self.directory} holds checkpoints of a run: --resume goes on with "
                "it; else choose another folder, or delete that one."
            )
        if resume:
            raise ResumeError(
                f"{self.directory} holds no checkpoint to go on from: start the run "
                "again with --overwrite instead of --resume."
            )
        return state

    def restore(self, state: TrainState, batches: Positioned) -> TrainState:
        """Restores the newest good checkpoint; `start` says the arguments.

        A newer one that cannot be read, or does not hold what was saved, is reported
        and renamed, to `damaged-STEP`, once an older one has turned out to be good.
        Storage or devices that fail for other reasons raise, and nothing is renamed.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored, record = self._read(step, state)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged)
            batches.set_state(record["positions"])
            return restored
        raise ResumeError(
            f"no checkpoint in {self.directory} can be read, and none was touched: "
            + "; ".join(f"{step}: {why}" for step, why in damaged.items())
        )

    @property
    def has_best(self) -> bool:
        """Whether a checkpoint has had an evaluation that was finite."""
        return self._best.best(self._manager.all_steps()) is not None

    def best(self, state: TrainState) -> TrainState:
        """Returns the best checkpoint's state; of those that can be read, with a word.

        Args:
            state: Has its shapes and shardings; its arrays are given up first.

        Raises:
            ResumeError: There is none that was evaluated and can be read.
        """
        abstract = give_up(state)
        steps = set(self._manager.all_steps())
        while (step := self._best.best(steps)) is not None:
            try:
                return self._read(step, abstract)[0]
            except DamagedError as error:
                self._report(
                    f"{self.directory / str(step)}, the best checkpoint, cannot be "
                    f"read ({error}): the next best takes its place."
                )
                steps.remove(step)
        raise ResumeError(
            f"no checkpoint in {self.directory} that has been evaluated can be read."
        )

    def save(
        self,
        step: int,
        state: TrainState,
        position: Mapping[str, Any],
        objective: float | None = None,
    ) -> None:
        """Starts to save after `step` updates; a step that is saved stays as it is.

        Args:
            step: Updates done.
            state: State after them.
            position: This process' position in the data after them, as JSON.
            objective: Of this step's evaluation, if there was one: lower is better.

        Raises:
            SaveError: This save could not start, or the one before has failed.
        """
        if step == self.latest_step:
            return
        if objective is not None and not math.isfinite(objective):
            objective = None  # of no use, and JSON has no word for it
        record = {
            "identity": self._identity,
            "config": self._config,
            "positions": gather(position),
            "structure": structure(state),
            "fingerprint": fingerprint(state),
            "rank": objective,  # its name in checkpoints that there are
        }
        self._best.add(step, objective)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(seal(record))
        )
        self._saving(lambda: self._manager.save(step, args=items, force=True))

    def check(self) -> None:
        """Raises SaveError if the save that has ended last has failed."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save under way is on disk; raises SaveError if it fails."""
        self._saving(self._manager.wait_until_finished)

    def __enter__(self) -> Self:
        """Return the checkpointer."""
        self._stack.enter_context(quiet_checkpoints())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the save under way, then close."""
        try:
            self._saving(self._manager.close)
        except SaveError as error:
            if exc is None:
                raise
            # The first error is the one that ends the run.
            self._report(str(error))
        finally:
            self._stack.close()

    def _saving(self, act: Callable[[], object]) -> None:
        try:
            act()
        # Nobody documents what comes of a disk that fails.
        except Exception as error:
            settle()
            remote = "://" in str(self.directory)
            remedy = "look after the bucket" if remote else "make room"
            raise (BucketError if remote else SaveError)(
                f"could not save a checkpoint in {self.directory} "
                f"({first_line(error)}). Those that were complete are still good: "
                f"{remedy}, then go on with --resume."
            ) from error

    def _read(
        self, step: int, state: TrainState
    ) -> tuple[TrainState, Mapping[str, Any]]:
        """One checkpoint, checked.

        Raises:
            DamagedError: It cannot be read, or is not what was saved.
            ResumeError: It belongs to another run.
        """
        folder = self.directory / str(step)
        # Alone and first: with another model Orbax would complain about shapes.
        record = self._reader.record(step)
        self._check_identity(record["identity"])
        if record["structure"] != structure(state):
            raise ResumeError(
                f"{folder} holds other parameters or another optimizer's state than "
                "the code makes now, though the settings are the same: go on with the "
                "code that has saved it."
            )
        restored = self._reader.state(step, abstract_like(state))
        if fingerprint(restored) != record["fingerprint"]:
            raise DamagedError("its arrays are not those that were saved")
        return restored, record

    def _read_objectives(self) -> None:
        for step in self._manager.all_steps():
            try:
                record = self._reader.record(step)
            except DamagedError:
                continue  # `restore` reports it
            self._best.add(step, record.get("rank"))

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        for step, why in damaged.items():
            name = f"damaged-{step}"
            while (self.directory / name).exists():
                name += "-again"
            gather(None)  # all have found the name before it is taken
            if is_first():
                (self.directory / str(step)).rename(self.directory / name)
            self._report(
                f"Checkpoint {self.directory / str(step)} cannot be used ({why}): it "
                f"is now {name}, and the run goes on from the one before."
            )
        if damaged:
            gather(None)
            self._manager.reload()

    def _check_identity(self, saved: Mapping[str, Any]) -> None:
        differences = compare(saved, self._identity)
        if differences:
            raise ResumeError(
                f"{self.directory} belongs to another run ({'; '.join(differences)}). "
                "Give the same settings to go on, or another --run-dir."
            )
