"""Fine-tuning on GLUE as the subject of a study."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.assembly import Parts, make_parts
from experiments.configs.glue import GlueConfig
from experiments.data.glue import TASKS
from experiments.data.hub import model_folder
from experiments.encoders import encoder_config
from experiments.glue.job import make_loss, read_texts
from experiments.glue.presets import parse, preset
from experiments.models.encoder import functional_encoder
from experiments.study.runs import Record
from experiments.study.subject import Shared
from experiments.training.record import compare
from experiments.training.run import reporter


class Glue:
    """Runs of experiments.glue, judged by the best epoch's score."""

    module = "experiments.glue"
    unit = "examples"

    def parse(self, arguments: Sequence[str]) -> GlueConfig:
        """Reads the command's arguments."""
        return parse(arguments)

    def check_comparable(self, configs: Mapping[str, GlueConfig]) -> None:
        """Refuses arms on one task that learn other examples, or from another encoder.

        Raises:
            ValueError: One does.
        """
        first, *others = configs
        for name in others:
            if differences := compare(_given(configs[first]), _given(configs[name])):
                raise ValueError(
                    f"{name} is not trained on what {first} is "
                    f"({'; '.join(differences)}): give data and model to all alike."
                )

    def parts(self, config: GlueConfig) -> Parts:
        """Returns what is trained, on the encoder's shape alone."""
        task = TASKS[config.data.task]
        folder = model_folder(config.model.name, print)
        init_params, apply = functional_encoder(
            encoder_config(config.model, config.data.max_length, config.mesh, folder),
            task.outputs,
            config.optimization.adapter,
        )
        loss = make_loss(apply, task)
        return make_parts(config, 1, init_params, loss, self.unit)

    def prepare(
        self, configs: Sequence[GlueConfig], folder: Path, console: Console
    ) -> Shared:
        """Reads the examples of all tasks, and the encoder, as their runs do."""
        report = reporter(console)
        found: dict[str, Mapping[str, str]] = {}
        for config in configs:
            if config.data.task in found:
                continue
            with console.status(f"Reading {config.data.task}", spinner="line"):
                source = model_folder(config.model.name, report)
                shape = encoder_config(
                    config.model, config.data.max_length, config.mesh, source
                )
                task = TASKS[config.data.task]
                _, facts = read_texts(config, task, source, shape, report)
            found[config.data.task] = facts
        return Shared(found)

    def fingerprints(self, config: GlueConfig, shared: Shared) -> Mapping[str, Any]:
        """Returns those of the task's examples and of the encoder."""
        return shared.fingerprints[config.data.task]

    def fingerprints_read(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns all of them."""
        return settings["examples"]["fingerprints"]

    def defaults(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns those of the recipe for the method."""
        method = settings["optimization"]["optimizer"]
        return preset(settings["preset"], method).decisive()

    def common(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns recipe and encoder."""
        encoder = settings["fingerprints"]["encoder"]
        return {"preset": settings["preset"], "encoder": encoder}

    def columns(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Returns all losses and scores."""
        return [name for name in row if name.startswith("validation_")]

    def result(self, record: Record) -> float:
        """Returns the score of the best epoch, negated: lower is better."""
        if record.diverged is not None:
            return math.inf
        found = score(record)
        return math.inf if found is None else -found

    def shown(self, record: Record) -> str:
        """Returns the score of the best epoch, in per cent."""
        return f"{-100 * self.result(record):.2f}"


def _given(config: GlueConfig) -> dict[str, Any]:
    return config.as_dict()["data"] | {"model.name": config.model.name}


def score(record: Record) -> float | None:
    """Returns the task's score after the best epoch; None if none was finite."""
    return best_scores(record)[main_metric(record)]


def best_scores(record: Record) -> dict[str, float]:
    """Returns all scores after the best epoch, by name."""
    columns = of_validation(record.curve)
    best = best_epoch(columns[main_metric(record)])
    return {name: values[best] for name, values in columns.items()}


def of_validation(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an evaluation has added, without the prefix that says so."""
    prefix = "validation_"
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


def best_epoch(scores: Sequence[float | None]) -> int:
    """Returns the place of the highest score; None, which was not finite, is lowest."""
    return max(
        range(len(scores)),
        key=lambda at: -math.inf if scores[at] is None else scores[at],
    )


def main_metric(record: Record) -> str:
    """Returns the name of the score that the table has."""
    return TASKS[record.settings["data"]["task"]].metrics[0]


GLUE = Glue()
