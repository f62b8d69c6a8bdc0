"""Stands in for training: a loss that is known, in the files that a run leaves."""

import json
import math
import sys
from pathlib import Path

from experiments.data.corpus import load_corpus
from experiments.presets import parse
from experiments.training.folder import RunFolder

MODEL = (
    "--steps 4 --eval-every 1 --batch-size 4 --sequence-length 8 --rank 2 "
    "--update-proj-gap 2 --history 2 --validation-tokens 64 --model.vocab-size 280 "
    "--model.hidden-size 8 --model.intermediate-size 8 --model.num-heads 1 "
    "--model.num-layers 1"
).split()
SECONDS = 10.0  # a step


def write_texts(folder: Path) -> str:
    """Writes some texts and returns the pattern that finds them."""
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"{number} and some more words " * 9)
    return f"{folder}/*.txt"


class FakeRuns:
    """Called in the place of `Processes.run`; keeps what it was called with.

    Attributes:
        best: Learning rate of the lowest loss, by method.
        diverges_above: Learning rate above which a run ends with an error.
        breaks: Part of the name of runs that fail.
        last_loss: What the last evaluation gives instead of a loss, if anything.
        started: Names of the runs, in order.
        arguments: Those of the newest run.
        on_start: Called with the name before a run; it may return an exit code.
    """

    def __init__(self) -> None:
        self.best = {"adamw": 1e-3, "galore": 8e-3, "natural_galore": 4e-3}
        self.diverges_above = math.inf
        self.breaks = None
        self.last_loss = {}
        self.started: list[str] = []
        self.arguments: list[str] = []
        self.on_start = lambda name: None

    def loss(self, method: str, rate: float, seed: int, rank: int, step: int) -> float:
        distance = abs(math.log2(rate / self.best[method]))
        return 3 + distance + 0.01 * seed + 0.1 / rank + 1 / step

    def __call__(self, arguments, log: Path) -> int:
        config = parse(arguments)
        folder = RunFolder(config.run_dir)
        name = folder.path.name
        self.arguments = list(arguments)
        self.started.append(name)
        if (code := self.on_start(name)) is not None:
            return code
        if self.breaks and self.breaks in name:
            log.write_text("Traceback\nSomeError: the disk is on fire\n")
            return 1
        log.write_text("")
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        corpus = load_corpus(config.text.data).summary
        folder.write_config(config.as_dict() | {"corpus": dict(corpus)})
        if config.learning_rate > self.diverges_above:
            folder.metrics.write_text(json.dumps(self.row(config, 1)) + "\n")
            log.write_text("step 2\nerror: step 2: update_norm not finite (...)\n")
            return 1
        rows = [self.row(config, step) for step in range(1, config.run.steps + 1)]
        rows[-1] |= self.last_loss
        folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder.report.write_text("# Report\n")
        return 0

    def row(self, config, step: int) -> dict:
        method, rank = config.optimization.optimizer, config.optimization.rank
        loss = self.loss(method, config.learning_rate, config.run.seed, rank, step)
        return {
            "step": step,
            "loss": loss,
            "tokens": 32.0,
            "seconds": SECONDS,
            "validation_loss": loss,
        }


def in_process(arguments, log: Path) -> int:
    """Trains for real, in this process."""
    from experiments import pretrain

    with log.open("w") as output:
        kept, sys.stderr = sys.stderr, output
        try:
            return pretrain.main(arguments)
        finally:
            sys.stderr = kept
