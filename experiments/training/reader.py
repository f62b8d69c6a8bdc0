"""Reads checkpoints that may be damaged, with all processes of one mind about them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from experiments.errors import PassingError
from experiments.training.distributed import gather
from experiments.training.quiet import quiet_reads
from experiments.training.record import first_line, unseal
from experiments.training.state import TrainState

# Of storage, network and devices; the words are those of TensorStore and XLA, of gcsfs
# and what it rests on, and of file systems on a network.
_NOT_DAMAGE = (
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "HttpError",
    "Forbidden",
    "ClientError",
    "ServerDisconnected",
    "TransportError",
    "RefreshError",
    "TimeoutError",
    "ConnectionError",
    "Connection reset",
    "Stale file handle",
    "Input/output error",
)
_WAIT = 2.0  # seconds before the second try


class DamagedError(Exception):
    """A checkpoint cannot be read, or is not what was saved."""


class StorageError(OSError, PassingError):
    """A checkpoint could not be read, for a reason that says nothing about it."""


class Reader:
    """Reads the items of checkpoints; all processes make the same calls.

    Where one process fails to read its part, a `DamagedError` is raised in all.
    """

    def __init__(self, directory: epath.Path) -> None:
        """Reads from folders of `directory`, which are named by their step."""
        self._directory = directory
        index = jax.process_index()
        # It waits for no other process: one may fail alone, and the others would wait
        # for long.
        self._checkpointer = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=index,
                active_processes={index},
                barrier_sync_key_prefix=f"reader-{index}",
            ),
        )

    def record(self, step: int) -> Mapping[str, Any]:
        """Returns the record of a checkpoint, unsealed."""
        json = ocp.args.JsonRestore()
        return _agreed(lambda: unseal(self._read(step, record=json)["record"]))

    def state(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of a checkpoint.

        Args:
            step: Names the checkpoint.
            abstract: Shapes, dtypes and shardings of the result.
        """
        restore = ocp.args.StandardRestore(abstract)

        def read() -> TrainState:
            with quiet_reads():
                return self._read(step, state=restore)["state"]

        return _agreed(read)

    def close(self) -> None:
        """Gives up what it holds."""
        self._checkpointer.close()

    def _read(self, step: int, **items: Any) -> Mapping[str, Any]:
        return self._checkpointer.restore(
            self._directory / str(step), ocp.args.Composite(**items)
        )


def _agreed(read: Callable[[], Any]) -> Any:
    """What `read` returns, if no process fails to read its own, twice.

    Raises:
        DamagedError: A process failed.
        StorageError: It did for a reason that says nothing about the checkpoint.
    """
    value = problem = None
    for wait in (_WAIT, 0.0):
        try:
            value, problem = read(), None
            break
        # Whatever a damaged file leads to.
        except Exception as error:
            problem = first_line(error)
            time.sleep(wait)
    problems = [found for found in gather(problem) if found is not None]
    for found in problems:
        if any(reason in found for reason in _NOT_DAMAGE):
            raise StorageError(
                f"a checkpoint could not be read, which says nothing about its state "
                f"({found}). Nothing was changed: try --resume again when storage and "
                "devices are there, with memory to spare."
            )
    if problems:
        raise DamagedError(problems[0])
    return value
