"""Copies of the metrics for TensorBoard and for Weights & Biases."""

import importlib
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from experiments.training.metrics import Mirror

_WANDB_RUN_ID = "wandb_run_id.txt"


def open_mirrors(
    run_dir: Path,
    *,
    keep_until: int,
    wandb_project: str | None,
    config: Mapping[str, Any],
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> list[Mirror]:
    """Opens TensorBoard's mirror and, if a project is given, Weights & Biases'.

    One that cannot be opened is reported and left out: a run that a scheduler has
    started again must not end because a service is away.

    Args:
        run_dir: The run's folder. TensorBoard reads RUN_DIR/tensorboard.
        keep_until: Last step whose metrics stay; later ones will be made again.
        wandb_project: Weights & Biases project. None: not used.
        config: The run's settings, shown there.
        report: Tells the user that a mirror could not be opened.

    Raises:
        ValueError: A project is given but wandb is not installed.
    """
    openers: list[tuple[str, Callable[[], Mirror]]] = [
        ("TensorBoard", lambda: TensorBoard(run_dir / "tensorboard", keep_until))
    ]
    if wandb_project is not None:
        wandb = _import_wandb()
        openers.append(
            (
                "Weights & Biases",
                lambda: WeightsAndBiases(wandb, wandb_project, run_dir, config),
            )
        )
    mirrors = []
    for name, opener in openers:
        try:
            mirrors.append(opener())
        # Whatever a library of another's raises: no picture is worth the run.
        except Exception as error:
            report(f"{name} could not be opened ({type(error).__name__}: {error}).")
    return mirrors


class TensorBoard:
    """Event files that TensorBoard reads; one more each time the run goes on.

    Written in the caller's thread. tensorboardX' own SummaryWriter hands rows to a
    thread that a full disk kills, after which the training waits for it forever.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, keep_until: int) -> None:
        """Starts a file whose readers drop what older files hold of later steps."""
        folder.mkdir(parents=True, exist_ok=True)
        # The name holds the second; a run killed and started again within one would
        # overwrite its file.
        suffix = f".{time.time_ns() % 10**9:09d}"
        self._events = EventsWriter(str(folder / "events"), suffix)
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=keep_until + 1, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one step's numbers."""
        values = [Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._events.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()


class WeightsAndBiases:
    """A run of a Weights & Biases project, the same one when the run goes on.

    Steps that are done again after a resume are in it already; it ignores the second
    copy, which is bit for bit the first on the same devices.
    """

    name = "Weights & Biases"

    def __init__(
        self, wandb: Any, project: str, run_dir: Path, config: Mapping[str, Any]
    ) -> None:
        """Starts the run, or goes on with the one whose id `run_dir` keeps."""
        kept = run_dir / _WANDB_RUN_ID
        if not kept.exists():
            kept.write_text(secrets.token_hex(4), "utf-8")
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=kept.read_text("utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs one step's numbers."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Sends what is left to send."""
        self._run.finish()


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ValueError(
            "--wandb needs the package wandb, which is not installed: "
            "`uv sync --group wandb`, or leave --wandb out."
        ) from error
