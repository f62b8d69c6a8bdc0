"""How well a model plans: `python -m experiments.tinyagent evaluate --help`.

Examples -> prompts -> plans, a batch at a time, each kept at once -> scores -> a JSON
file, which `table` reads.
"""

import dataclasses
import hashlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.command import INTERRUPTED, explain_memory
from experiments.configs.run import MeshConfig, check_at_least
from experiments.configs.tinyagent import (
    PlannerModelConfig,
    RequestsConfig,
)
from experiments.files import replace_text
from experiments.tinyagent import bfcl
from experiments.tinyagent.examples import load_test
from experiments.tinyagent.planner import Planner, WritingConfig
from experiments.tinyagent.presets import PROGRAM
from experiments.tinyagent.prompt import put
from experiments.tinyagent.retrieval import Retriever
from experiments.tinyagent.score import Score, score
from experiments.tinyagent.trained import prompt_of, settings_of
from experiments.tinyagent.unfinished import Unfinished
from experiments.training.run import reporter

MADE_UP = "made up by a grammar, for development: says little about real requests"
# What to try where memory is too small.
MEMORY = "a smaller --batch-size, --model.dtype bfloat16 or a larger --mesh.fsdp"
# What a table shows of a score, and how.
MEASURES = {
    "success": "share of plans whose graph of calls equals the label's, %",
    "exact": "and whose arguments do, too, %",
    "tools": "share of plans that call the label's tools, %",
    "parsed": "share of answers that are plans, %",
    "distance": "edits from a plan's graph to the label's, mean",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Let a model plan requests, and score the plans.

    python -m experiments.tinyagent evaluate --model.name runs/tinyagent-adamw/model

    What is cut short, by Ctrl-C too, goes on when the same command is started again.

    Attributes:
        data: What is asked: the test split of TinyAgent's data, or made-up requests.
        writing: How it answers.
        model: What is asked.
        mesh: Devices to spread over.
        batch_size: Requests at a time.
        bfcl: JSON-lines files of the Berkeley Function-Calling Leaderboard, simple or
            parallel questions, to ask instead; each with its ground_truth, or with one
            in the file of the same name in the folder possible_answer beside.
        bfcl_questions: The first so many of each. None: all.
        retriever: Folder of a model of `tools`, which picks the tools, and with
            --shown-examples the examples, of made requests' prompts.
        out: JSON file to write. None: one named after what is asked, beside the model
            if it is of a run, else in runs/.
        overwrite: Replace that file, and what a command that was cut short has left.
    """

    data: tyro.conf.OmitArgPrefixes[RequestsConfig]
    writing: tyro.conf.OmitArgPrefixes[WritingConfig] = dataclasses.field(
        default_factory=WritingConfig
    )
    model: PlannerModelConfig = dataclasses.field(default_factory=PlannerModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    batch_size: int = 16
    bfcl: tuple[Path, ...] = ()
    bfcl_questions: int | None = None
    retriever: Path | None = None
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        check_at_least(1, self, "batch_size")
        if self.bfcl_questions is not None:
            check_at_least(1, self, "bfcl_questions")
        split = self.mesh.data * self.mesh.fsdp
        if self.batch_size % split:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of the "
                f"{split} devices (data x fsdp) that a batch is split over."
            )
        if self.retriever is not None and (self.data.data is not None or self.bfcl):
            raise ValueError(
                "--retriever is for made requests: the prompts of other data have "
                "their tools already."
            )

    @property
    def file(self) -> Path:
        """Where it is written, the default resolved."""
        if self.out is not None:
            return self.out
        asked = "made" if self.data.data is None else Path(self.data.data).stem
        if self.retriever is not None:
            asked += "-retrieved"
        if self.bfcl:
            asked = "-".join(["bfcl", *(path.stem for path in self.bfcl)])
        name, model = f"evaluation-{asked}.json", Path(self.model.name).expanduser()
        if settings_of(self.model.name) is not None:
            return model.parent / name
        return Path("runs") / f"{model.name.removesuffix('.gguf')}-{name}"

    @property
    def unfinished(self) -> Path:
        """What is written until all is there."""
        return self.file.with_suffix(".unfinished.jsonl")


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and how an answer is scored."""

    name: str
    prompt: str
    request: str
    label: str
    judge: Callable[[str], Score]


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        config = parse(args)
        console = Console(highlight=False)
        prepare(config)
        found = evaluate(config, console)
        show(found, console)
        found = {"command": f"{PROGRAM} evaluate {shlex.join(args)}".strip(), **found}
        text = json.dumps(found, indent=1, ensure_ascii=False)
        replace_text(config.file, text + "\n")
        config.unfinished.unlink()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        return explain_memory(error, MEMORY)
    except KeyboardInterrupt:
        print("Saved. Start the same command again to go on.", file=sys.stderr)
        return INTERRUPTED
    console.print(f"Scores and plans: {config.file}", markup=False, soft_wrap=True)
    return 0


def parse(args: Sequence[str]) -> EvaluateConfig:
    """Reads the command line; a mistake in it ends the process with code 2.

    Raises:
        ValueError: The model's run cannot be read.
    """
    return tyro.cli(
        EvaluateConfig,
        args=args,
        default=EvaluateConfig(data=RequestsConfig(prompt=prompt_of(args))),
        prog=f"{PROGRAM} evaluate",
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def prepare(config: EvaluateConfig) -> None:
    """Makes the folder to write into, before anything takes time.

    Raises:
        ValueError: What is to be written is there, or what is to be asked is what the
            model has learnt.
        OSError: The folder cannot be made.
    """
    if config.file.exists() and not config.overwrite:
        raise ValueError(f"{config.file} is there already: give --out or --overwrite.")
    settings = settings_of(config.model.name)
    learnt = None if settings is None else settings["data"]["data"]
    asked = config.data.data
    if asked is not None and learnt is not None and not config.bfcl:
        one, other = Path(asked), Path(learnt)
        if one.is_file() and other.exists() and one.samefile(other):
            raise ValueError(f"{asked} is what the model was trained on: give another.")
    config.file.parent.mkdir(parents=True, exist_ok=True)


def evaluate(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Asks and scores.

    Returns:
        What the file says: of what model and data, scores, speed, each plan.

    Raises:
        ValueError: Model or data cannot be read, or there are none.
        OSError: A file cannot be read.
    """
    report = reporter(console)
    questions, left_out = _questions(config, report)
    size = config.batch_size
    # Alike in length: a batch is padded to its longest prompt.
    questions = sorted(questions, key=lambda question: len(question.prompt))
    facts = {
        "model": config.model.name,
        "trained": _trained(config.model.name),
        "data": _data(config),
        "settings": {
            **dataclasses.asdict(config.writing),
            **_prompt(config),
            "retriever": None if config.retriever is None else str(config.retriever),
            "dtype": config.model.dtype,
        },
    }
    speeds: list[float] = []
    with (
        Planner.open(config.model, config.mesh, report) as planner,
        Progress(console=console) as progress,
    ):
        planner.check([question.prompt for question in questions], config.writing)
        prints = {"weights": planner.fingerprint, "prompts": _fingerprint(questions)}
        unfinished = Unfinished(config.unfinished, facts | prints)
        plans = unfinished.start(afresh=config.overwrite)
        if plans:
            report(f"{len(plans)} of {len(questions)} plans are there already.")
        done = len(plans)
        task = progress.add_task("Planning", total=len(questions), completed=done)
        for first in range(done, len(questions), size):
            batch = questions[first : first + size]
            prompts = [question.prompt for question in batch]
            written = planner.write(prompts, config.writing, size)
            if written.tokens_per_second is not None:
                speeds.append(written.tokens_per_second)
            more = [
                {
                    "name": question.name,
                    "request": question.request,
                    "plan": text,
                    "label": question.label,
                    **dataclasses.asdict(question.judge(text)),
                }
                for question, text in zip(batch, written.texts, strict=True)
            ]
            unfinished.add(more)
            plans += more
            progress.update(task, advance=len(batch))
    return {
        **facts,
        "left_out": left_out,
        "count": len(plans),
        "scores": {
            name: statistics.mean(float(plan[name]) for plan in plans)
            for name in MEASURES
        },
        # None: every batch had a program of its own, whose compiling is no speed.
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "plans": plans,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Prints scores."""
    table = Table(
        title=f"{found['count']} requests, {found['data']}", show_header=False
    )
    for name, what in MEASURES.items():
        table.add_row(name, written(name, found["scores"][name]), what)
    speed = found["tokens_per_second"]
    told = "not measured" if speed is None else f"{speed:,.0f}"
    table.add_row("speed", told, "tokens per second, of a batch together")
    console.print(table)


def written(name: str, value: float) -> str:
    """Returns a score in words: shares in per cent, a distance as it is."""
    return f"{value:.2f}" if name == "distance" else f"{100 * value:.1f}"


def _questions(
    config: EvaluateConfig, report: Callable[[str], None]
) -> tuple[list[Question], dict[str, str]]:
    if config.bfcl:
        asked, left_out = bfcl.read(config.bfcl, config.bfcl_questions, report)
        return [
            Question(
                one.name,
                put(one.system(brief=config.data.prompt.brief), one.request),
                one.request,
                one.label,
                one.score,
            )
            for one in asked
        ], left_out
    examples, left_out = load_test(config.data, report)
    if config.retriever is not None:
        retriever = Retriever.load(config.retriever, report)
        examples = retriever.rewrite(examples, config.data.prompt)
    return [
        Question(
            one.name,
            put(one.system, one.request),
            one.request,
            one.text,
            lambda text, label=one.plan: score(text, label),
        )
        for one in examples
    ], left_out


def _prompt(config: EvaluateConfig) -> dict[str, Any]:
    prompt = config.data.prompt
    if config.bfcl:  # a question has its own tools, and no examples
        return {"brief": prompt.brief, "shown_examples": 0, "other_tools": 0}
    return dataclasses.asdict(prompt)


def _data(config: EvaluateConfig) -> str:
    if config.bfcl:
        return f"BFCL's {', '.join(path.stem for path in config.bfcl)}"
    return MADE_UP if config.data.data is None else f"of {config.data.data}"


def _trained(name: str) -> dict[str, Any] | None:
    """How a model was trained, if it is a run's; else None."""
    settings = settings_of(name)
    if settings is None:
        return None
    optimization = settings["optimization"]
    return {
        "method": optimization["optimizer"],
        "rank": optimization["rank"],
        "learning_rate": optimization["learning_rate"],
        "seed": settings["run"]["seed"],
        "model": settings["model"]["name"],
        "data": settings["data"]["data"] or MADE_UP,
        "examples": settings["examples"]["train"],
        "epochs": settings["run"]["epochs"],
        "batch_size": settings["run"]["batch_size"],
        "max_length": settings["data"]["max_length"],
        "optimization": optimization,
    }


def _fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 of what is asked, in hex."""
    asked = [(one.name, one.prompt, one.label) for one in questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
