"""What test_two_processes.py runs in each of its processes: `PORT INDEX FOLDER`."""

import functools
import json
import signal
import sys
from pathlib import Path

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.data.hub import UnreachableError
from experiments.training.distributed import agreed, fetch
from experiments.training.fingerprint import fingerprint
from experiments.training.loop import Outcome, Plan, train
from experiments.training.mesh import make_mesh
from experiments.training.metrics import NullMetrics
from experiments.training.reader import Reader
from experiments.training.state import TrainState, shardings_of
from experiments.training.step import make_train_step
from tests.experiments.training.small_run import (
    OPTIMIZER,
    Numbers,
    Quiet,
    as_batch,
    checkpointer,
    initial_params,
    loss_fn,
)

STEPS = 8


class Two:
    """Runs on two processes with two devices each."""

    def __init__(self, index: int, folder: Path) -> None:
        self.index = index
        self.folder = folder
        self.mesh = make_mesh(1, 4, explicit=False)

    def initial_state(self) -> TrainState:
        def make(key):
            params = initial_params(key)
            return TrainState(params, OPTIMIZER.init(params), jax.numpy.int32(0))

        key = jax.random.key(0)
        shardings = jax.tree.map(
            lambda x: self.sharding(P(None, "fsdp") if x.shape == (8, 8) else P()),
            jax.eval_shape(make, key),
        )
        return jax.jit(make, out_shardings=shardings)(key)

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    @functools.cached_property
    def step_fn(self):
        return make_train_step(
            loss_fn,
            OPTIMIZER,
            optax.constant_schedule(1e-2),
            shardings=shardings_of(self.initial_state()),
        )

    def place(self, number: int) -> dict[str, jax.Array]:
        rows = self.sharding(P(("data", "fsdp")))
        return {
            name: jax.make_array_from_callback(
                value.shape, rows, lambda piece, value=value: value[piece]
            )
            for name, value in as_batch(number).items()
        }

    def run(self, name: str, *, steps: int = STEPS, at=None, report=print) -> Outcome:
        """Trains in a folder; `at` are actions by the number of the batch read."""
        batches = Numbers(at)

        def set_state(states):
            assert len(states) == 2
            batches.number = states[self.index]["number"]

        batches.set_state = set_state
        with checkpointer(self.folder / name, report=report) as saved:
            return train(
                saved.start(self.initial_state(), batches, auto_resume=True),
                step_fn=self.step_fn,
                batches=batches,
                place=self.place,
                evaluate=lambda params: {},
                plan=Plan(steps, 100, 100),
                checkpointer=saved,
                metrics=NullMetrics(),
                progress=Quiet(),
            )


def describe(outcome: Outcome) -> dict:
    return {
        "step": int(outcome.state.step),
        "exit_code": outcome.exit_code,
        "fingerprint": fingerprint(outcome.state),
    }


def fail():
    raise UnreachableError("the network is gone")


def main(index: int, folder: Path) -> dict:
    two, first = Two(index, folder), index == 0
    found = {}
    with jax.set_mesh(two.mesh):
        found["straight"] = describe(two.run("straight"))
        # A signal that only the second process gets.
        stop = {} if first else {4: lambda: signal.raise_signal(signal.SIGTERM)}
        found["stopped"] = describe(two.run("stopped", at=stop))
        found["resumed"] = describe(two.run("stopped"))
        # A batch that only the first process cannot read.
        try:
            two.run("failed", at={5: fail} if first else {})
        except (OSError, ValueError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
        found["after error"] = describe(two.run("failed"))
        # A part of a checkpoint that only the second process cannot read.
        for steps in (3, 6):
            two.run("damaged", steps=steps)
        read = Reader._read

        def read_part(self, step, **items):
            if step == 6 and "state" in items and not first:
                raise ValueError("this part is broken")
            return read(self, step, **items)

        Reader._read = read_part
        lines: list[str] = []
        found["damaged"] = describe(two.run("damaged", report=lines.append))
        found["lines"] = lines
        # An array of which neither has all.
        whole = fetch(two.initial_state().params["w"])
        found["fetched"] = None if whole is None else whole.tolist()
        # Here it may pass, elsewhere it does not.
        try:
            with agreed():
                raise UnreachableError("503") if first else ValueError("a bad line")
        except ValueError as error:
            found["lasting"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    port, number, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(
        f"localhost:{port}", 2, number, initialization_timeout=60
    )
    (path / f"{number}.json").write_text(json.dumps(main(number, path)))
