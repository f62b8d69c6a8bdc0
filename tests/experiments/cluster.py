"""Two processes that train together."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from experiments.training.metrics import read_metrics
from tests.xla_flags import COMPILE_FAST

ROOT = Path(__file__).parents[2]
TIMEOUT = 240


def free_port() -> int:
    """One for the coordinator of processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Cluster:
    """A command in two processes with two devices each; a context manager.

    Args:
      module: Of the command.
      arguments: Its own, but for `--mesh.distributed`.
      folder: For what the processes print.
    """

    def __init__(self, module: str, arguments: list[str], folder: Path) -> None:
        port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"{index}.log" for index in range(2)]
        flags = "--xla_force_host_platform_device_count=2"
        self.processes = []
        for index, log in enumerate(self.logs):
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{flags} {COMPILE_FAST}",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
            command = [sys.executable, "-m", module, *arguments]
            with log.open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [*command, "--mesh.distributed"],
                        cwd=ROOT,
                        env=env,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self) -> list[int]:
        """Exit codes."""
        return [process.wait(TIMEOUT) for process in self.processes]

    def until_step(self, run_dir: Path, step: int) -> None:
        """Waits until a step's row is written."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            with contextlib.suppress(FileNotFoundError, ValueError):
                if any(
                    row["step"] >= step
                    for row in read_metrics(run_dir / "metrics.jsonl")
                ):
                    return
            assert time.monotonic() < deadline and self.alive(), self.output()
            time.sleep(0.005)

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def output(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()
