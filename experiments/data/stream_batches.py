"""Streams to batches, with grain: read ahead, in a thread or in worker processes.

What travels through grain is a block: the rows of one stream in one batch, together
with the stream's position behind them. Whoever takes a block knows how far its stream
has been used, whatever has been read ahead, and by whom.
"""

import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from experiments.data.batches import Share, State
from experiments.data.documents import DocumentReader
from experiments.data.hub import Report
from experiments.data.pipeline import stack
from experiments.data.sequences import Batch
from experiments.data.streams import Position, Streams
from experiments.data.text_files import OnBadInput
from experiments.data.token_cache import TokenCache
from experiments.data.tokenizer import Tokenizer

# Batches that are read ahead.
_AHEAD = 2
# Seconds to go on trying where nothing can be read.
_PATIENCE = 300.0


@dataclass(frozen=True)
class Source:
    """What the reading side needs, wherever it runs: it is sent to workers.

    Attributes:
      streams: Streams and their order.
      tokenizer: Makes the tokens.
      token_cache: Folder that keeps them. None: they are not kept.
      on_bad_input: Whether what cannot be read raises, or ends its shard.
      block: Rows of a stream in one batch.
    """

    streams: Streams
    tokenizer: Tokenizer
    token_cache: Path | None
    on_bad_input: OnBadInput
    block: int

    def blocks(
        self, stream: int, position: Position, report: Report
    ) -> Iterator[tuple[Batch, Position]]:
        """Yield the blocks of a stream and the position behind each, without end."""
        cache = None
        if self.token_cache is not None:
            cache = TokenCache(self.token_cache, report)
        reader = DocumentReader(
            self.tokenizer, cache, self.on_bad_input, report, _PATIENCE
        )
        rows = self.streams.rows(stream, position, reader)
        while True:
            taken, positions = zip(*(next(rows) for _ in range(self.block)))
            yield stack(taken), positions[-1]


class StreamBatches:
    """Endless batches of streamed text; the `Batches` of several streams.

    The rows of a global batch are in the order of the streams, ``block`` rows of each.
    A process reads the streams of its rows, its workers equal parts of them.
    """

    def __init__(
        self, source: Source, *, share: Share, workers: int, report: Report
    ) -> None:
        """Start nothing yet.

        Args:
          source: What is read.
          share: The rows that this process provides.
          workers: Processes that read ahead. 0: a thread does.
          report: Takes a line for the user.

        Raises:
          ValueError: Processes or workers cannot share the streams evenly.
        """
        count = source.streams.count
        if count % share.count:
            raise ValueError(
                f"{count} streams cannot be shared by {share.count} processes: give "
                f"--streams a multiple of {share.count}."
            )
        mine = count // share.count
        if workers and mine % workers:
            raise ValueError(
                f"{workers} workers cannot share the {mine} streams of a process: "
                f"--streams {count} must be a multiple of {share.count} processes "
                f"times --workers."
            )
        self._source = source
        self._workers = workers
        self._report = report
        first = share.index * mine
        self._positions = {first + index: Position() for index in range(mine)}
        self._blocks: grain.DatasetIterator | None = None
        self._end: weakref.finalize | None = None

    def __next__(self) -> Batch:
        if self._blocks is None:
            self._blocks = self._start()
            # Also where nobody closes: grain's own clean-up at exit may come too late.
            self._end = weakref.finalize(self, self._blocks.close)
        try:
            blocks = {stream: next(self._blocks) for stream in self._positions}
        except Exception:
            self.close()  # part of a batch is read: the next try starts from its front
            raise
        self._positions = {
            stream: Position(*map(int, block["position"]))
            for stream, block in blocks.items()
        }
        rows = [block["rows"] for block in blocks.values()]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> State:
        """Return the position of each stream of this process."""
        streams = {str(name): list(place) for name, place in self._positions.items()}
        return {"streams": streams}

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go to where all processes were; `Batches` says more."""
        saved: dict[str, Sequence[int]] = {}
        for state in states:
            saved |= state.get("streams", {})
        missing = [name for name in self._positions if str(name) not in saved]
        if missing:
            raise ValueError(
                f"The saved position lacks the streams {missing} of this run; it has "
                f"{sorted(saved, key=int)}. The states of all processes are needed."
            )
        self.close()
        self._positions = {
            name: Position(*saved[str(name)]) for name in self._positions
        }

    def close(self) -> None:
        """End threads and processes that read ahead; the position stays."""
        if self._end is not None:
            self._end()
        self._blocks = self._end = None

    def _start(self) -> grain.DatasetIterator:
        """Return an iterator over the blocks, stream after stream, read ahead."""
        ahead = _AHEAD * len(self._positions)
        report = _print_line if self._workers else self._report
        blocks = _Blocks(self._source, self._positions, report)
        if self._workers:
            # grain reads its settings from absl's flags, which want to be parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(
                num_workers=self._workers,
                per_worker_buffer_size=ahead // self._workers,
            )
            return iter(blocks.mp_prefetch(options, worker_init_fn=_init_worker))
        return iter(ThreadPrefetchIterDataset(blocks, prefetch_buffer_size=ahead))


def _init_worker(index: int, count: int) -> None:
    """Prepare a worker process; the arguments are grain's."""
    import jax

    # grain imports jax; whatever may use it here must leave the accelerator alone.
    jax.config.update("jax_platforms", "cpu")
    # Signals go to the whole group of processes, but the main one decides what they
    # mean: it saves, and needs batches to finish its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent has ended, also by SIGKILL."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _print_line(line: str) -> None:
    """Tell the user from a worker, whose parent may be waiting for it."""
    print(line, file=sys.stderr, flush=True)


class _Blocks(grain.IterDataset):
    """Blocks of some streams in turn, endless."""

    def __init__(
        self, source: Source, positions: Mapping[int, Position], report: Report
    ) -> None:
        super().__init__()
        self._source = source
        self._positions = dict(positions)
        self._report = report

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keep the streams of one worker; grain calls this in it."""
        del sequential_slice  # never asked for
        self._positions = dict(list(self._positions.items())[sl])

    def __iter__(self) -> "_BlockIterator":
        return _BlockIterator(self._source, self._positions, self._report)


class _BlockIterator(grain.DatasetIterator):
    """Iterator of `_Blocks`."""

    def __init__(
        self, source: Source, positions: Mapping[int, Position], report: Report
    ) -> None:
        super().__init__()
        self._blocks = [
            source.blocks(stream, position, report)
            for stream, position in positions.items()
        ]
        self._turn = 0

    def __next__(self) -> dict[str, Any]:
        rows, position = next(self._blocks[self._turn])
        self._turn = (self._turn + 1) % len(self._blocks)
        return {"rows": rows, "position": tuple(position)}

    def get_state(self) -> State:
        """Return nothing: blocks carry their positions."""
        return {}

    def set_state(self, state: State) -> None:
        """Do nothing: a new iterator is made to go elsewhere."""
