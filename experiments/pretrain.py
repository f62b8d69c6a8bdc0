"""Pretrains a Llama on text: `python -m experiments.pretrain --help`.

Flow: config -> corpus -> tokens -> batches -> step(state, batch) -> metrics.jsonl ->
evaluation -> checkpoint -> report. The run's folder holds all that is needed to
resume it and to explain it.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optax
from rich.console import Console

from experiments.assembly import fetch_merged, parts_of
from experiments.command import Command
from experiments.configs.pretrain import PretrainConfig
from experiments.data.batches import Share
from experiments.data.text import Text, load_text
from experiments.models.llama_checkpoint import save_llama
from experiments.presets import parse
from experiments.training import distributed
from experiments.training.folder import RunFolder
from experiments.training.loop import Plan
from experiments.training.microbatches import Batch, LossFn
from experiments.training.report import Report, sizes
from experiments.training.run import Job, Layout, reporter
from experiments.training.state import TrainState
from experiments.training.step import make_evaluate
from experiments.training.throughput import Throughput


def prepare(
    config: PretrainConfig, folder: RunFolder, layout: Layout, console: Console
) -> Job:
    """Reads the text and makes what is trained on it."""
    run, parts = config.run, parts_of(config)
    text = load_run_text(config, folder, layout.share, console)
    return Job(
        parts=parts,
        plan=Plan(run.steps, run.eval_every, run.checkpoint_every, run.max_skipped),
        batches=text.batches,
        evaluate=make_validation(parts.loss_fn, layout.place, text),
        fingerprints=text.identity,
        data={"corpus": dict(text.summary)},
        throughput=Throughput.of(
            config.model,
            config.text.sequence_length,
            config.devices,
            config.optimization.adapter,
        ),
        finish=make_finish(config, folder, text),
        may_diverge=True,
    )


def make_finish(
    config: PretrainConfig, folder: RunFolder, text: Text
) -> Callable[[optax.Params], None]:
    """Returns a function that saves a model and its tokenizer as transformers does."""
    end = text.tokenizer.eos_id
    facts = {
        # Where documents are joined, each has the end of another before it.
        "bos_token_id": end if config.text.treatment == "joined" else None,
        "eos_token_id": end,
        "max_position_embeddings": config.text.sequence_length,
    }

    def finish(params: optax.Params) -> None:
        merged = fetch_merged(params, config)
        if distributed.is_first():
            save_llama(folder.model, config.model, merged, facts)
            text.tokenizer.save(folder.model)

    return finish


def load_run_text(
    config: PretrainConfig, folder: RunFolder, share: Share, console: Console
) -> Text:
    """Reads the text of a run, this process' share of every batch."""
    with console.status("Reading and tokenizing text", spinner="line"):
        return load_text(
            config.text,
            vocab_size=config.model.vocab_size,
            batch_size=config.run.batch_size,
            # Evaluated in pieces as large as those that training works on.
            eval_batch_size=config.microbatch_size,
            seed=config.run.seed,
            share=share,
            tokenizer_file=folder.tokenizer,
            report=reporter(console),
        )


def make_validation(
    loss_fn: LossFn, place: Callable[[Batch], Batch], text: Text
) -> Callable[[optax.Params], dict[str, float]]:
    """Returns a function of the parameters that gives the validation metrics."""
    mean_loss = make_evaluate(loss_fn, place)

    def evaluate(params: optax.Params) -> dict[str, float]:
        loss = mean_loss(params, text.validation)
        return {
            "validation_loss": loss,
            "validation_perplexity": float(np.exp(loss)),
            "validation_bits_per_byte": loss / math.log(2) / text.bytes_per_token,
        }

    return evaluate


def make_report(
    config: PretrainConfig,
    folder: RunFolder,
    state: TrainState,
    rows: Sequence[dict[str, Any]],
    command: str,
) -> Report:
    """Gathers what a finished run has to say; one of its rows has an evaluation."""
    last = [row for row in rows if "validation_loss" in row][-1]
    loss, perplexity, bits = (
        # Null in JSON where it was not finite.
        math.nan if last[f"validation_{name}"] is None else last[f"validation_{name}"]
        for name in ("loss", "perplexity", "bits_per_byte")
    )
    tokens, seconds = (sum(row[name] for row in rows) for name in ("tokens", "seconds"))
    name = config.optimization.optimizer
    facts = {
        "optimizer": f"{name}, learning rate {config.learning_rate:g}",
        "steps": f"{last['step']:,} ({tokens:,.0f} tokens)",
        "final validation loss": f"{loss:.4f} nats per token",
        "final validation perplexity": f"{perplexity:.2f}",
        "bits per byte": f"{bits:.4f}",
        **sizes(state),
        "time": f"{seconds:,.0f} s ({tokens / seconds:,.0f} tokens/s)",
        "steps skipped": str(sum(row["skipped"] for row in rows)),
        "loss spikes": str(sum("spike" in row for row in rows)),
        "checkpoint": str(folder.checkpoints / str(last["step"])),
    }
    if folder.model.exists():
        facts["model"] = f"{folder.model} (of the best checkpoint)"
    other = "adamw" if name != "adamw" else "natural_galore"
    program = COMMAND.program
    here = f"{program} --preset {config.preset}"
    return Report(
        title=f"Llama {config.preset} with {name}",
        facts=facts,
        command=command,
        next_steps=(
            (f"The same with {other}, to compare", f"{here} --optimizer {other}"),
            (
                "A published size, on C4 from the hub",
                f"{program} --preset llama_60m --data c4",
            ),
            ("Text of your own", f"{here} --data 'texts/*.txt' --run-dir runs/mine"),
        ),
    )


COMMAND = Command("experiments.pretrain", parse, prepare, make_report)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
