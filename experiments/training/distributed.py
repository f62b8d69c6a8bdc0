"""Several processes: joining them, agreeing between them, sharing a batch.

Everything here is the identity, or does nothing, where there is one process.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from experiments.data.batches import Share
from experiments.errors import PassingError, may_pass


class OtherProcessError(ValueError):
    """Another process could not go on."""


class OtherProcessPassingError(OtherProcessError, PassingError):
    """Another process could not go on, because of what may pass."""


def join() -> None:
    """Joins the processes of a cluster; before anything else asks for devices.

    Raises:
        ValueError: JAX finds no description of a cluster.
    """
    # JAX would catch SIGTERM from now on, and act on it only where a loop asks for it:
    # a process that still starts has nothing to save and may end at once.
    jax.config.update("jax_enable_preemption_service", False)
    count, index = (os.environ.get(f"JAX_{n}") for n in ("NUM_PROCESSES", "PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if index is None else int(index),
        )
    except ValueError as error:
        raise ValueError(
            f"--mesh.distributed finds no cluster to join ({error}). On TPU pods, "
            "SLURM, Open MPI and Kubernetes JAX detects it; elsewhere set "
            "JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Returns the JSON values that all processes gave, in their order, to each."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    # To a power of two: each length is a program of its own.
    padded = np.zeros(1 << int(np.max(lengths)).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(bytes(row[:length]))
        for row, length in zip(rows, lengths, strict=True)
    ]


def fetch(x: jax.Array) -> np.ndarray | None:
    """Returns an array on the host of the first process, None elsewhere.

    All processes call it. It is put together on the host where one process has all of
    it; of several all devices hold it as a whole until the call returns.
    """
    if not x.is_fully_addressable:
        assert isinstance(x.sharding, NamedSharding)
        whole = NamedSharding(x.sharding.mesh, PartitionSpec())
        # Waited for, or where it is not read the next one's would be there already.
        x = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=whole)(x))
    return np.asarray(x) if is_first() else None


@contextmanager
def agreed() -> Iterator[None]:
    """Lets an error that one process meets in the block end all of them.

    Without it the others would wait for that process until the cluster times out.

    Raises:
        OtherProcessError: Here all went well, or what went wrong may pass, elsewhere it
            did not; one that may pass if all that failed may.
    """
    error = None
    try:
        yield
    # Whatever it is: the others wait.
    except Exception as caught:
        error = caught
    words = gather(None if error is None else (str(error), may_pass(error)))
    failed = {i: word for i, word in enumerate(words) if word is not None}
    passing = all(passing for _, passing in failed.values())
    # What lasts elsewhere goes before what may pass here.
    if error is not None and (passing or not may_pass(error)):
        raise error
    if failed:
        raise (OtherProcessPassingError if passing else OtherProcessError)(
            "; ".join(f"process {i}: {message}" for i, (message, _) in failed.items())
        ) from error


class BatchPlacement:
    """Which rows of a global batch this process provides, and their way to devices.

    Attributes:
        share: The part of every global batch.
    """

    def __init__(self, sharding: Sharding) -> None:
        """Reads the shares off a sharding of the batch axis.

        Raises:
            ValueError: Two processes hold overlapping but different rows.
        """
        self._sharding = sharding
        # A batch of as many rows as devices shows who holds which of its pieces.
        rows = sharding.num_devices
        first = {
            device: piece.indices(rows)[0]
            for device, (piece,) in sharding.devices_indices_map((rows,)).items()
        }
        pieces = sorted(set(first.values()))
        held: dict[int, set[int]] = {}
        for device, start in first.items():
            held.setdefault(device.process_index, set()).add(pieces.index(start))
        blocks = sorted({tuple(sorted(mine)) for mine in held.values()})
        mine = tuple(sorted(held[jax.process_index()]))
        if len(blocks) * len(mine) != len(pieces) or sum(map(len, blocks)) != len(
            pieces
        ):
            raise ValueError(
                "processes would share some rows of a batch but not all: choose mesh "
                "sizes that divide the devices of a process or are multiples of them."
            )
        self.share = Share(blocks.index(mine), len(blocks))
        self._pieces = len(pieces)
        self._mine = mine

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this process' rows on its devices; returns global arrays."""
        return {name: self._place(value) for name, value in batch.items()}

    def _place(self, local: np.ndarray) -> jax.Array:
        rows = len(local) * self.share.count
        size = rows // self._pieces

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            start, _, _ = index[0].indices(rows)
            first = self._mine.index(start // size) * size
            return local[(slice(first, first + size), *index[1:])]

        return jax.make_array_from_callback(
            (rows, *local.shape[1:]), self._sharding, piece
        )
