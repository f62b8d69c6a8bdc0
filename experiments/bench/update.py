"""Parts update and refresh: the optimizers' updates of the hidden matrices, in turn."""

import functools
from collections.abc import Mapping
from typing import Any

from experiments.bench import limits
from experiments.bench.config import Bench, Part, PeerName
from experiments.bench.limits import Rates, Work
from experiments.bench.optimizers import (
    NotInstalledError,
    Peer,
    check_installed,
    galore_rank,
    peer_of,
)
from experiments.bench.programs import Updates
from experiments.bench.records import Row, Task, timed_figures
from experiments.bench.shapes import (
    Layout,
    matrices,
    random_gradients,
    random_params,
)
from experiments.bench.timing import Candidate, Timings, interleaved
from experiments.bench.torch_galore import NOTE, TorchUpdates
from experiments.models.formats import Dtype
from experiments.training.record import first_line

REFERENCE: PeerName = "optax_galore"
_ALONE = "alone"


def tasks(bench: Bench, rates: Rates) -> list[Task]:
    """Returns the work of both parts: a task for each layout and dtype."""
    return [
        Task(
            "update",
            f"update: {layout}, {dtype}",
            Case(bench, rates, layout, dtype).measure,
        )
        for dtype in bench.config.dtypes
        for layout in bench.config.layouts
        if {"update", "refresh"} & set(bench.config.parts)
    ]


class Case:
    """One layout in one dtype, all optimizers."""

    def __init__(
        self, bench: Bench, rates: Rates, layout: Layout, dtype: Dtype
    ) -> None:
        """Nothing is made or compiled yet."""
        self.bench, self.rates, self.layout, self.dtype = bench, rates, layout, dtype
        self.parts: list[Part] = [
            part for part in ("update", "refresh") if part in bench.config.parts
        ]
        model = bench.run(bench.config.preset).model
        self.shapes = matrices(model, layout, dtype)

    def measure(self) -> list[Row]:
        """Compiles all, lets them take turns, and returns a row each."""
        config = self.bench.config
        gradients = random_gradients(self.shapes, config.seed)
        params = random_params(self.shapes, config.seed + 1)
        ready: dict[str, Updates | TorchUpdates] = {}
        rows: list[Row] = []
        for name in config.optimizers:
            try:
                updates = self._prepare(name, gradients, params)
            except NotInstalledError as error:
                rows += [self._row(part, name, note=str(error)) for part in self.parts]
            except Exception as error:  # whatever a peer raises is its result
                rows += [
                    self._row(part, name, error=first_line(error))
                    for part in self.parts
                ]
            else:
                if updates is not None:
                    ready[name] = updates
        for part in self.parts:
            refresh = part == "refresh"
            repeats = config.slow_repeats if refresh else config.repeats
            timings = interleaved(
                self._candidates(ready, refresh), repeats=repeats, seed=config.seed
            )
            rows += self._rows(part, ready, timings)
        return rows

    def _prepare(
        self, name: PeerName, gradients: Any, params: Any
    ) -> Updates | TorchUpdates | None:
        """An optimizer that has chosen its first bases; None if not for this case."""
        if name == "torch_galore":
            check_installed(name)
            if (self.layout, self.dtype) != ("list", "float32"):
                return None
            preset = self.bench.config.preset
            run = self.bench.run(preset, "galore", galore_rank(self.bench, preset))
            settings = run.optimization
            return TorchUpdates(
                gradients,
                rank=settings.rank,
                gap=settings.update_proj_gap,
                scale=settings.scale,
                rate=run.learning_rate,
            )
        peer = peer_of(self.bench, name, self.bench.config.preset)
        updates = Updates(peer, gradients, params)
        updates.compile(None)
        if self._in_two_programs(peer):
            updates.compile(False)
            updates.compile(True)
        updates.run(1, refresh=True)
        return updates

    def _candidates(
        self, ready: Mapping[str, Updates | TorchUpdates], refresh: bool
    ) -> dict[str, Candidate]:
        candidates: dict[str, Candidate] = {}
        for name, updates in ready.items():
            if isinstance(updates, TorchUpdates):
                candidates[name] = functools.partial(updates.run, refresh=refresh)
                continue
            if refresh and updates.peer.gap is None:
                continue
            run = functools.partial(updates.run, refresh=refresh)
            candidates[name] = run
            if self._in_two_programs(updates.peer):
                candidates[f"{name} {_ALONE}"] = functools.partial(run, alone=True)
        return candidates

    def _in_two_programs(self, peer: Peer) -> bool:
        """Whether it is timed as two programs too: in one dtype, to compile less."""
        return peer.two_programs and self.dtype == self.bench.config.dtypes[0]

    def _rows(
        self, part: Part, ready: Mapping[str, Updates | TorchUpdates], timings: Timings
    ) -> list[Row]:
        rows = []
        for name, updates in ready.items():
            figures: dict[str, float] = {}
            samples: dict[str, list[float]] = {}
            for key, candidate in (
                (part, name),
                (_ALONE, f"{name} {_ALONE}"),
            ):
                if candidate in timings.seconds:
                    seconds = timings.seconds[candidate]
                    ratios = timings.ratios(candidate, REFERENCE)
                    samples[key] = seconds
                    figures |= timed_figures(key, seconds, ratios)
            if part in samples and isinstance(updates, Updates):
                work = self._work(part, updates)
                if work is not None:
                    median = figures[f"{part}_ms"] / 1e3
                    figures |= work.figures(self.rates, median, self.dtype)
            error = timings.errors.get(name)
            note = NOTE if isinstance(updates, TorchUpdates) else ""
            if samples or error:
                rows.append(self._row(part, name, figures, samples, note, error))
        return rows

    def _work(self, part: Part, updates: Updates) -> Work | None:
        count = limits.refresh_work if part == "refresh" else limits.steady_work
        return count(updates.peer, self.shapes)

    def _row(
        self,
        part: Part,
        name: str,
        figures: dict[str, float] | None = None,
        samples: dict[str, list[float]] | None = None,
        note: str = "",
        error: str | None = None,
    ) -> Row:
        return Row(
            part=part,
            shapes=self.bench.config.preset,
            optimizer=name,
            layout=self.layout,
            dtype=self.dtype,
            figures=figures or {},
            samples=samples or {},
            note=note,
            error=error,
        )
