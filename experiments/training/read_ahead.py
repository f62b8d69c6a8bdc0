"""Batches, one ahead of training, with the position to go on from."""

from collections.abc import Mapping
from typing import Any, Protocol

from experiments.training.step import Batch


class Source(Protocol):
    """Endless batches; see `experiments.data.batches.Batches`."""

    def __next__(self) -> Batch:
        """Returns this process' rows of the next batch."""
        ...

    def get_state(self) -> Mapping[str, Any]:
        """Returns the position before the next batch, as JSON."""
        ...


class ReadAhead:
    """Holds the next batch, so that it is known in time whether there is one.

    Attributes:
        position: Position of the source before the next batch.
        error: What reading the next batch raised; None if it is there.
    """

    position: Mapping[str, Any]
    error: Exception | None = None

    def __init__(self, source: Source) -> None:
        """Reads the first batch."""
        self._source = source
        self._read()

    def take(self) -> Batch:
        """Returns the next batch and reads the one behind it."""
        batch = self._batch
        self._read()
        return batch

    def _read(self) -> None:
        self.position = self._source.get_state()
        try:
            self._batch = next(self._source)
        # Raised on by the loop, once it has saved what is done.
        except Exception as error:
            self.error = error
