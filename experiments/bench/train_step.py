"""Part step: whole training steps, a refresh spread over the steps to the next."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.assembly import Parts, parts_of, step_of
from experiments.bench.config import Bench, PeerName
from experiments.bench.optimizers import TRAINABLE, Peer, peer_of
from experiments.bench.records import Row, Task, tasks_by_preset, timed_figures
from experiments.bench.timing import Candidate, Timings, interleaved
from experiments.configs.pretrain import PresetName, PretrainConfig
from experiments.training.record import first_line
from experiments.training.state import create_state

REFERENCE: PeerName = "adamw"


def tasks(bench: Bench) -> list[Task]:
    """Returns the work of the part: the demo, and the preset."""
    return tasks_by_preset(bench, "step", measure)


class Steps:
    """Training steps of one optimizer on one batch, at whatever count is asked for."""

    def __init__(self, peer: Peer, seed: int) -> None:
        """Compiles the programs and does a first refresh."""
        self._peer, config = peer, peer.run
        parts = parts_of(config)
        self._state = create_state(parts.init_params, parts.optimizer, seed=seed)
        self._batch = jax.device_put(_random_batch(config, seed))
        self._program = self._compile(config, parts, None)
        self._steady = (
            self._compile(config, parts, False) if peer.two_programs else None
        )
        if peer.gap is not None:
            self.run(1, refresh=True)

    def run(self, calls: int, *, refresh: bool, alone: bool = False) -> None:
        """Does steps with or without a refresh, and waits for the last.

        Args:
            calls: How many.
            refresh: Whether each of them refreshes.
            alone: Whether a program that can only do steady steps does it, not the one
                that training runs.
        """
        count = (self._peer.gap or 2) + (0 if refresh else 1)
        number = np.asarray(count, np.int32)
        program = self._steady if alone else self._program
        metrics = None
        for _ in range(calls):
            self._state, metrics = program(self._state, self._batch, number)
        jax.block_until_ready((self._state, metrics))

    def _compile(
        self, config: PretrainConfig, parts: Parts, refresh: bool | None
    ) -> jax.stages.Compiled:
        step = step_of(config, parts, None, refresh)

        def at_count(state: Any, batch: Any, count: jax.Array) -> Any:
            opt_state = optax.tree.set(state.opt_state, count=count)
            return step(state._replace(opt_state=opt_state), batch)

        jitted = jax.jit(at_count, donate_argnums=0)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        return jitted.lower(self._state, self._batch, count).compile()


def measure(bench: Bench, preset: PresetName) -> list[Row]:
    """Lets the steps of all optimizers take turns, and returns a row each."""
    config, ready, rows = bench.config, {}, []
    for name in config.optimizers:
        if name not in TRAINABLE:
            continue
        if name == "muon" and preset != "demo":
            continue  # seconds a step, and nothing here is judged by it
        try:
            peer = peer_of(bench, name, preset)
            ready[name] = peer, Steps(peer, config.seed)
        except Exception as error:  # whatever a peer raises is its result
            rows.append(Row("step", preset, name, error=first_line(error)))
    repeats = config.repeats if preset == "demo" else config.slow_repeats
    steady = interleaved(_steady(ready), repeats=repeats, seed=config.seed)
    refresh = interleaved(
        _refreshes(ready), repeats=config.slow_repeats, seed=config.seed
    )
    return rows + [
        _row(preset, name, peer, steady, refresh) for name, (peer, _) in ready.items()
    ]


def amortised(steady: list[float], refresh: list[float], gap: int) -> list[float]:
    """Seconds a step where one in `gap` refreshes, for each round of steady steps.

    The median refresh stands for all of them.
    """
    extra = float(np.median(refresh))
    return [((gap - 1) * seconds + extra) / gap for seconds in steady]


def _steady(ready: dict[PeerName, tuple[Peer, Steps]]) -> dict[str, Candidate]:
    candidates: dict[str, Candidate] = {}
    for name, (peer, steps) in ready.items():
        run = functools.partial(steps.run, refresh=False)
        candidates[name] = run
        if peer.two_programs:
            candidates[_alone(name)] = functools.partial(run, alone=True)
    return candidates


def _refreshes(ready: dict[PeerName, tuple[Peer, Steps]]) -> dict[str, Candidate]:
    return {
        name: functools.partial(steps.run, refresh=True)
        for name, (peer, steps) in ready.items()
        if peer.gap is not None
    }


def _alone(name: str) -> str:
    """The steady step in a program of its own."""
    return f"{name} alone"


def _row(
    preset: PresetName, name: str, peer: Peer, steady: Timings, refresh: Timings
) -> Row:
    error = steady.errors.get(name) or refresh.errors.get(name)
    if error is not None:
        return Row("step", preset, name, error=error)
    samples = {"steady": steady.seconds[name]}
    spread = samples["steady"]
    figures = timed_figures("steady", spread, steady.ratios(name, REFERENCE))
    if peer.gap is not None:
        samples["refresh"] = refresh.seconds[name]
        figures |= timed_figures("refresh", samples["refresh"], None)
        spread = amortised(samples["steady"], samples["refresh"], peer.gap)
        figures["gap"] = float(peer.gap)
    figures |= timed_figures("amortised", spread, steady.ratios_of(spread, REFERENCE))
    alone = _alone(name)
    if alone in steady.seconds:
        samples["alone"] = steady.seconds[alone]
        ratios = steady.ratios(alone, name)
        figures |= timed_figures("alone", samples["alone"], ratios)
    return Row("step", preset, name, figures=figures, samples=samples)


def _random_batch(config: PretrainConfig, seed: int) -> dict[str, np.ndarray]:
    """Random tokens, as many as a step's of that run."""
    rows, length = config.run.batch_size, config.text.sequence_length
    tokens = np.random.default_rng(seed).integers(
        config.model.vocab_size, size=(rows, length + 1), dtype=np.int32
    )
    return {"tokens": tokens, "weights": np.ones((rows, length), np.float32)}
