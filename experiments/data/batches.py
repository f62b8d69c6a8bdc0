"""What training asks of its batches, and how processes share them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from experiments.data.sequences import Batch

State = dict[str, Any]


class Batches(Protocol):
    """Endless batches of host arrays whose position can be saved.

    The order is a function of settings and seed: neither the number of processes nor
    that of workers changes it. A state may be restored with another number of them.
    """

    def __next__(self) -> Batch:
        """Return this process' rows of the next batch (see `sequences`)."""
        ...

    def get_state(self) -> State:
        """Return this process' part of the position, as JSON can hold it.

        What has been read ahead and not been returned is not part of it.
        """
        ...

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go to a position.

        Args:
          states: What `get_state` gave in all processes that saved, in any order.

        Raises:
          ValueError: They do not describe a position of these batches.
        """
        ...

    def close(self) -> None:
        """End threads and processes that read ahead."""
        ...


@dataclass(frozen=True)
class Share:
    """What a process provides: block ``index`` of ``count`` equal blocks of rows."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Check that there is such a block."""
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"There is no share {self.index} of {self.count}: the index counts "
                "from 0 and stays below the count."
            )

    def rows(self, batch_size: int) -> range:
        """Return the rows of a global batch that belong to this share.

        Raises:
          ValueError: The batch cannot be split evenly.
        """
        if batch_size % self.count:
            raise ValueError(
                f"A batch of {batch_size} sequences cannot be split over {self.count} "
                f"processes: give a multiple of {self.count}."
            )
        size = batch_size // self.count
        return range(self.index * size, (self.index + 1) * size)


class CountedBatches:
    """Batches whose position is a number of them, the same in all processes."""

    _kind: str  # what they are of, for the error
    _done = 0

    def get_state(self) -> State:
        """Return how many batches there were."""
        return {"batches": self._done}

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go to where all processes were; `Batches` says more."""
        counts = {state.get("batches") for state in states}
        done = counts.pop() if len(counts) == 1 else None
        if not isinstance(done, int):
            raise ValueError(
                f"The saved position is not one of {self._kind}: each process needs "
                f"the same number of batches, found {list(states)}."
            )
        self._done = done

    def close(self) -> None:
        """Do nothing: nothing reads ahead."""


WHOLE = Share()
"""The share of a process that is alone."""
