"""Training runs in processes of their own, with one CPU core each."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

_ENVIRONMENT = {
    # A share of the accelerator, where there is one, instead of nearly all its memory.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # LAPACK's threads spin where there is no core for them: SVDs of a second took 40.
    "OPENBLAS_NUM_THREADS": "1",
    # Memory that a step has freed is kept for the next: each page that comes back from
    # the system costs a fault.
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=8589934592"
    ":glibc.malloc.trim_threshold=17179869184",
}
_ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Processes:
    """Runs of a command that trains; all of them can be told to save and end."""

    def __init__(self, module: str, gpus: Sequence[str] = ()) -> None:
        """Takes note.

        Args:
            module: The command's name, as of `python -m`.
            gpus: As of `visible_gpus`. Each run is shown one of them, on which there
                are fewest. Empty: all that this process is shown.
        """
        self._module = module
        self._runs_on = dict.fromkeys(gpus, 0)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, arguments: Sequence[str], log: Path) -> int:
        """Runs the command to its end; any thread may call it.

        Args:
            arguments: Of the command.
            log: File that takes what it prints.

        Returns:
            Its exit code; that of SIGTERM, without a start, after `stop`.
        """
        flags = f"{os.environ.get('XLA_FLAGS', '')} {_ONE_CORE}".strip()
        with log.open("wb") as output, self._gpu() as shown:
            with self._lock:
                if self._stopped:
                    return 143
                process = subprocess.Popen(
                    [sys.executable, "-m", self._module, *arguments],
                    env=_ENVIRONMENT | os.environ | {"XLA_FLAGS": flags} | shown,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)

    def stop(self) -> None:
        """Tells all to save and end, and starts no other."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                # Ctrl-C has reached them already; a SIGTERM beside it does no harm.
                process.terminate()

    @contextlib.contextmanager
    def _gpu(self) -> Iterator[dict[str, str]]:
        """Takes a GPU for a run; yields the variables that show it no other one."""
        if not self._runs_on:
            yield {}
            return
        with self._lock:
            gpu = min(self._runs_on, key=self._runs_on.__getitem__)
            self._runs_on[gpu] += 1
        try:
            yield {"CUDA_VISIBLE_DEVICES": gpu}
        finally:
            with self._lock:
                self._runs_on[gpu] -= 1
