"""A request planned and carried out: `python -m experiments.tinyagent plan --help`."""

import dataclasses
import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from experiments.command import explain_memory
from experiments.configs.run import MeshConfig
from experiments.configs.tinyagent import (
    PlannerModelConfig,
    PromptConfig,
)
from experiments.tinyagent.dataset import Example
from experiments.tinyagent.examples import write_prompt
from experiments.tinyagent.executor import Outcome, execute
from experiments.tinyagent.plan import Plan, parse_plan
from experiments.tinyagent.planner import Planner, WritingConfig
from experiments.tinyagent.presets import PROGRAM
from experiments.tinyagent.prompt import put
from experiments.tinyagent.retrieval import Retriever
from experiments.tinyagent.sandbox import TOOLS, Desk
from experiments.tinyagent.trained import prompt_of
from experiments.training.run import reporter


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Plan a request and carry it out, on tools that are nowhere but in memory.

    python -m experiments.tinyagent plan "Invite Alice to lunch tomorrow at noon"
    --model.name runs/tinyagent-natural_galore/model

    Attributes:
        request: What is asked for.
        prompt: What the planner is told, by default as of the run that the model is of.
            Examples are shown with --retriever alone.
        today: The date that "tomorrow" is counted from.
        writing: How it writes.
        model: The planner.
        mesh: Devices to spread over.
        system_file: A prompt to use instead, such as the one of TinyAgent's data that
            the model was trained on.
        plan_file: A plan to carry out, instead of asking a model.
        retriever: Folder of a model of `tools`, which picks the tools of the prompt.
            None: it has all 16.
    """

    request: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REQUEST")]
    prompt: tyro.conf.OmitArgPrefixes[PromptConfig] = dataclasses.field(
        default_factory=PromptConfig
    )
    today: datetime.date = datetime.date(2024, 5, 13)
    writing: tyro.conf.OmitArgPrefixes[WritingConfig] = dataclasses.field(
        default_factory=WritingConfig
    )
    model: PlannerModelConfig = dataclasses.field(default_factory=PlannerModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    system_file: Path | None = None
    plan_file: Path | None = None
    retriever: Path | None = None


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    console = Console(highlight=False)
    try:
        config = parse(sys.argv[1:] if args is None else args)
        say = reporter(console)
        say(f"Request: {config.request}")
        text = plan_of(config, say)
        say(f"\nPlan:\n{text}")
        desk = Desk()
        outcomes = execute(parse_plan(text), desk.tools)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        return explain_memory(error, "--model.dtype bfloat16 or a larger --mesh.fsdp")
    say("\nExecution:")
    for outcome in outcomes:
        say(f"  {line_of(outcome)}")
    say("\nOn the desk now, and not before:")
    for line in desk.changes() or ["nothing"]:
        say(f"  {line}")
    return 1 if any(outcome.error for outcome in outcomes) else 0


def parse(args: Sequence[str]) -> PlanConfig:
    """Reads the command line; a mistake in it ends the process with code 2.

    Raises:
        ValueError: The model's run cannot be read.
    """
    prompt = prompt_of(args)
    return tyro.cli(
        PlanConfig,
        args=args,
        default=PlanConfig(
            request=tyro.MISSING,
            prompt=PromptConfig(
                brief=prompt.brief, shown_examples=prompt.shown_examples
            ),
        ),
        prog=f"{PROGRAM} plan",
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def plan_of(config: PlanConfig, report: Callable[[str], None]) -> str:
    """Returns the file's plan, or what the model writes.

    Raises:
        ValueError: The model cannot be read.
        OSError: A file cannot be read.
    """
    if config.plan_file is not None:
        return config.plan_file.read_text("utf-8").strip()
    system = write_prompt(TOOLS, config.today, [], brief=config.prompt.brief)
    if config.system_file is not None:
        system = config.system_file.read_text("utf-8").strip()
    elif config.retriever is not None:
        asked = Example("", system, config.request, Plan(()), "", config.today)
        retriever = Retriever.load(config.retriever, report)
        (found,) = retriever.rewrite([asked], config.prompt)
        system = found.system
    with Planner.open(config.model, config.mesh, report) as planner:
        rows = config.mesh.data * config.mesh.fsdp
        written = planner.write([put(system, config.request)], config.writing, rows)
    return written.texts[0]


def line_of(outcome: Outcome) -> str:
    """Returns when a step ran, what was called, and what came of it."""
    inside = ", ".join(map(repr, outcome.arguments))
    call = f"{outcome.step.number}. {outcome.step.tool}({inside})"
    came = f"failed: {outcome.error}" if outcome.error else repr(outcome.result)
    when = f"{1e3 * outcome.started:5.1f} to {1e3 * outcome.ended:5.1f} ms"
    return f"{when}  {call} -> {came}"
