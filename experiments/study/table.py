"""study.md: the arms of a study, the best one first."""

import math
from collections.abc import Sequence

from experiments.study.order import kendall_tau, swapped
from experiments.study.records import Records
from experiments.study.summary import Spread, Summary
from experiments.training.report import megabytes


def study_markdown(
    records: Records, summaries: Sequence[Summary], pictures: Sequence[str]
) -> str:
    """Writes what a study has found.

    Args:
        records: All runs.
        summaries: Of its arms, as of `summarize`.
        pictures: Names of the plots beside the file.
    """
    parts = [
        "# Study",
        "\n".join(arm_table(records, summaries)),
        order_line(summaries),
        *notes(records, summaries),
        "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def arm_table(records: Records, summaries: Sequence[Summary]) -> list[str]:
    """Returns the lines of the table."""
    lines = [
        "| arm | best learning rate | rates tried | loss at half | lowest to highest "
        "| loss at the end | lowest to highest | state | of matrices | a run |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for summary in summaries:
        half, end = summary.losses(summary.half), summary.final
        state = summary.records[0].state_bytes
        seeds = len(summary.records)
        every = len(records.seeds)
        few = "" if seeds == every else f" ({seeds} of {every} seeds)"
        lines.append(
            f"| {summary.arm} | {summary.learning_rate:g} "
            f"| {len(summary.tried)}, {summary.place} "
            f"| {loss(half.median)}{few} | {low_to_high(half)} "
            f"| **{loss(end.median)}**{few} | {low_to_high(end)} "
            f"| {megabytes(state['all'])} | {megabytes(state['matrices'])} "
            f"| {summary.seconds:,.0f} s |"
        )
    return lines


def order_line(summaries: Sequence[Summary]) -> str:
    """Compares the order of the arms at half of the steps with that at the end."""
    if len(summaries) < 2:
        return ""
    half = [summary.losses(summary.half).median for summary in summaries]
    end = [summary.final.median for summary in summaries]
    tau = kendall_tau(half, end)
    pairs = swapped([summary.arm for summary in summaries], half, end)
    changes = "; ".join(f"{ahead} passed {behind}" for ahead, behind in pairs)
    return (
        f"Order of the medians at half against the end: Kendall's tau {tau:.2f}"
        f"{f' ({changes})' if changes else ''}."
    )


def notes(records: Records, summaries: Sequence[Summary]) -> list[str]:
    """Returns what the table's figures are, and where they are from."""
    halves = sorted({summary.half for summary in summaries if summary.steps})
    steps = sorted({summary.records[0].settings["steps"] for summary in summaries})
    return [
        f"Half and end: after {_words(halves)} and {_words(steps)} steps. Learning "
        f"rates were tried on seed {records.seeds[0]}; inside: the best of them lies "
        "between worse ones.",
        *provenance(records, summaries[0]),
    ]


def provenance(records: Records, summary: Summary) -> list[str]:
    """Returns what holds for all figures, and how they were made.

    Args:
        records: All runs.
        summary: Of the arm whose model is described.
    """
    first = summary.records[0]
    adam = sorted(
        {
            record.settings["optimization"]["adam_learning_rate"]
            for record in records.runs.values()
        }
    )
    versions = sorted(
        {
            ", ".join(f"{name} {value}" for name, value in record.versions.items())
            for record in records.runs.values()
        }
    )
    return [
        "Validation loss in nats per token, medians over seeds "
        f"{', '.join(map(str, records.seeds))}. Preset {first.settings['preset']}; "
        f"{first.parameters['matrices'] / 1e6:.2f} M of "
        f"{first.parameters['all'] / 1e6:.2f} M parameters are in the matrices of "
        f"attention and MLP ({summary.arm}). Text "
        f"{first.settings['fingerprints']['text'][:12]}.",
        "Embeddings, norms and output layer are on Adam (learning rate "
        f"{_words(adam)}) in every row, unless the arguments of an arm say otherwise, "
        "and their state is in the first of the two. A run's seconds are those of "
        "training steps, the first of which compiles, without evaluations.",
        "Made by:\n\n" + "\n".join(f"    {command}" for command in records.commands),
        f"With {'; '.join(versions)}.",
    ]


def loss(value: float) -> str:
    """Writes a loss, four digits behind the point."""
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def low_to_high(spread: Spread) -> str:
    """Writes a range of losses."""
    return f"{loss(spread.low)} to {loss(spread.high)}"


def _words(values: Sequence[float]) -> str:
    return " or ".join(f"{value:g}" for value in values)
