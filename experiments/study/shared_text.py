"""What all runs of a study read: fetched, trained and tokenized once."""

import dataclasses
from pathlib import Path

from rich.console import Console

from experiments.configs import PretrainConfig
from experiments.data.batches import Share
from experiments.pretrain import load_run_text
from experiments.training.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class SharedText:
    """Text that is ready to be trained on.

    Attributes:
        fingerprints: Of text and tokenizer.
        arguments: Those of experiments.pretrain that spare a run the work.
    """

    fingerprints: dict[str, str]
    arguments: tuple[str, ...]


def prepare(config: PretrainConfig, folder: Path, console: Console) -> SharedText:
    """Reads the text as a run does, and keeps its tokens and its tokenizer.

    Each run still reads the text itself, to know that it is the same; what takes the
    time, training a tokenizer and tokenizing, is done here.

    Args:
        config: Settings of any of the runs.
        folder: Where tokens and tokenizer are kept; what is there is used again.
        console: Where to say what is read.

    Raises:
        FileNotFoundError: There is no such text or tokenizer.
        ValueError: Settings that do not fit together, or text that cannot be read.
    """
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
    return SharedText(text.identity, tuple(arguments))
