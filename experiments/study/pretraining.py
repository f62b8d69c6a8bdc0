"""Pretraining as the subject of a study."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.assembly import Parts, parts_of
from experiments.configs.pretrain import PretrainConfig
from experiments.data.batches import Share
from experiments.presets import parse, preset
from experiments.pretrain import load_run_text
from experiments.study.runs import Record
from experiments.study.subject import Shared
from experiments.training.folder import RunFolder
from experiments.training.record import compare


class Pretraining:
    """Runs of experiments.pretrain, all on the same text; judged by their last loss."""

    module = "experiments.pretrain"
    unit = "tokens"

    def parse(self, arguments: Sequence[str]) -> PretrainConfig:
        """Reads the command's arguments."""
        return parse(arguments)

    def check_comparable(self, configs: Mapping[str, PretrainConfig]) -> None:
        """Refuses arms that read other text.

        Raises:
            ValueError: One does.
        """
        texts = {name: _text(config) for name, config in configs.items()}
        first, *others = texts
        for name in others:
            if differences := compare(texts[first], texts[name]):
                raise ValueError(
                    f"{name} does not learn the same text as {first} "
                    f"({'; '.join(differences)}), so that their losses are no "
                    "comparison: give text, tokenizer, vocabulary and lengths to all "
                    "arms alike."
                )

    def parts(self, config: PretrainConfig) -> Parts:
        """Returns what is trained."""
        return parts_of(config)

    def prepare(
        self, configs: Sequence[PretrainConfig], folder: Path, console: Console
    ) -> Shared:
        """Reads the text as a run does, and keeps its tokens and its tokenizer.

        Each run still reads the text itself, to know that it is the same; what takes
        the time, training a tokenizer and tokenizing, is done here.

        Raises:
            FileNotFoundError: There is no such text or tokenizer.
            ValueError: Settings that do not fit, or text that cannot be read.
        """
        config = configs[0]
        cache = config.text.token_cache or folder / "tokens"
        arguments = ["--token-cache", str(cache)]
        config = dataclasses.replace(
            config, text=dataclasses.replace(config.text, token_cache=cache)
        )
        place = RunFolder(folder)
        text = load_run_text(config, place, Share(), console)
        text.batches.close()
        if place.tokenizer.exists() and config.text.tokenizer is None:
            arguments += ["--tokenizer", str(place.tokenizer)]
        return Shared(text.identity, tuple(arguments))

    def fingerprints(self, config: PretrainConfig, shared: Shared) -> Mapping[str, Any]:
        """Returns those of text and tokenizer."""
        return shared.fingerprints

    def fingerprints_read(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the text's."""
        return {"text": settings["corpus"]["fingerprint"]}

    def defaults(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns those of the preset for the method."""
        method = settings["optimization"]["optimizer"]
        return preset(settings["preset"], method).decisive()

    def common(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns preset and text."""
        return {name: settings[name] for name in ("preset", "text", "fingerprints")}

    def columns(self, row: Mapping[str, Any]) -> Sequence[str]:
        """Returns the loss alone, which the other metrics follow from."""
        return ["validation_loss"]

    def result(self, record: Record) -> float:
        """Returns the loss at the end."""
        return record.final_loss

    def shown(self, record: Record) -> str:
        """Returns the loss at the end."""
        return f"{record.final_loss:.4f}"


def _text(config: PretrainConfig) -> dict[str, Any]:
    facts = config.as_dict()
    return facts["text"] | {"model.vocab_size": facts["model"]["vocab_size"]}


PRETRAINING = Pretraining()
