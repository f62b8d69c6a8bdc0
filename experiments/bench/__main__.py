"""Measures our optimizers and their peers, in turn: `python -m experiments.bench`.

Flow: settings -> what the machine can do -> tasks of each part -> rows -> bench.json,
bench.md, plots, tables. bench.json is written after every task, so that a bench that
is cut short leaves what it has measured.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from experiments.bench import (
    compile_time,
    energy,
    environment,
    growth,
    memory,
    plots,
    state,
    table,
    train_step,
    update,
)
from experiments.bench.config import Bench, parse_args
from experiments.bench.limits import Rates, measure_rates
from experiments.bench.records import Row, Task
from experiments.bench.results import Results
from experiments.command import INTERRUPTED
from experiments.training.record import first_line

_FILE = "bench.json"


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    console = Console(highlight=False)
    try:
        bench = parse_args(args)
        folder = bench.config.bench_dir
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _FILE).exists() and not bench.config.overwrite:
            raise ValueError(
                f"{folder} holds a bench's results: --overwrite replaces them, "
                "--bench-dir chooses another folder."
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # Times to compile are the compiler's, whatever an earlier run has left.
    jax.config.update("jax_enable_compilation_cache", False)
    with console.status("Measuring the machine", spinner="line"):
        rates = measure_rates()
    results = Results(
        command=bench.command(args),
        environment=environment.describe(),
        config=dataclasses.asdict(bench.config) | {"extra": list(bench.extra)},
        rates=rates,
    )
    try:
        work(all_tasks(bench, rates, console), results, bench, console)
    except KeyboardInterrupt:
        code = INTERRUPTED
    else:
        code = 0
    names = plots.draw(results.rows, folder)
    (folder / "bench.md").write_text(table.markdown(results, names), "utf-8")
    table.show(results, console)
    console.print(f"Results: {folder}", markup=False, soft_wrap=True)
    return code


def all_tasks(bench: Bench, rates: Rates, console: Console) -> list[Task]:
    """Returns the work of the chosen parts, in the order in which it is done."""
    return [
        *state.tasks(bench),
        *update.tasks(bench, rates),
        *train_step.tasks(bench),
        *growth.tasks(bench),
        *energy.tasks(bench, console),
        *memory.tasks(bench),
        *compile_time.tasks(bench),
    ]


def work(
    tasks: Sequence[Task], results: Results, bench: Bench, console: Console
) -> None:
    """Does tasks one after the other; one that fails is a row with its error."""
    path = bench.config.bench_dir / _FILE
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        shown = bar.add_task("bench", total=len(tasks))
        for task in tasks:
            bar.update(shown, description=task.name)
            if not console.is_terminal:
                console.print(task.name, markup=False)
            started = time.perf_counter()
            try:
                rows = task.run()
            except Exception as error:  # the other tasks go on
                preset = bench.config.preset
                rows = [Row(task.part, preset, task.subject, error=first_line(error))]
            results.seconds[task.name] = time.perf_counter() - started
            results.loads[task.name] = os.getloadavg()[0]
            results.rows.extend(rows)
            results.write(path)
            bar.advance(shown)


if __name__ == "__main__":
    sys.exit(main())
