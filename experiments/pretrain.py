"""Pretrains a Llama on text: `python -m experiments.pretrain --help`.

Flow: config -> corpus -> tokens -> batches -> step(state, batch) -> metrics.jsonl ->
evaluation -> checkpoint -> report. The run's folder holds all that is needed to
resume it and to explain it.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console

import ngalore_jax as ng
from experiments.configs import PretrainConfig
from experiments.data.corpus import load_corpus
from experiments.data.pipeline import tokenize, train_batches, validation_batches
from experiments.data.tokenizer import load_tokenizer, train_bpe
from experiments.models.llama import Llama, LlamaConfig
from experiments.presets import parse
from experiments.training.checkpoint import Checkpointer
from experiments.training.folder import RunFolder
from experiments.training.loop import Outcome, Plan, train
from experiments.training.mesh import batch_sharding, make_mesh
from experiments.training.metrics import MetricsWriter, read_metrics
from experiments.training.optimizer import (
    adamw_state_bytes,
    build_optimizer,
    learning_rate_schedule,
    takes_explicit_axes,
)
from experiments.training.progress import ConsoleProgress
from experiments.training.report import Report, megabytes
from experiments.training.state import TrainState, create_state, shardings_of
from experiments.training.step import (
    Batch,
    LossFn,
    make_evaluate,
    make_train_step,
    next_token_loss,
)

_PROGRAM = "python -m experiments.pretrain"
if "UV_RUN_RECURSION_DEPTH" in os.environ:  # set by `uv run`, whose python it was
    _PROGRAM = f"uv run {_PROGRAM}"
_INTERRUPTED = 130  # the shell's exit code for Ctrl-C


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a run, ready for training."""

    batches: grain.DatasetIterator  # endless
    validation: list[Batch]  # always the same
    bytes_per_token: float  # over the validation batches
    identity: dict[str, str]  # fingerprints of text and tokenizer
    summary: Mapping[str, Any]  # what was read, for people


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    console = Console(highlight=False)
    try:
        config = parse(args)
        folder = RunFolder(config.run_dir)
        folder.claim(resume=config.run.resume, overwrite=config.run.overwrite)
        text = load_text(config, folder, console)
        outcome = pretrain(config, folder, text, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted with nothing new to save.", file=sys.stderr)
        return _INTERRUPTED
    if outcome.interrupted:
        console.print(
            f"Saved step {int(outcome.state.step)} of {config.run.steps} in "
            f"{folder.checkpoints}. Go on with:\n  {_resume_command(args)}",
            soft_wrap=True,
            markup=False,
        )
        return _INTERRUPTED
    report = make_report(config, folder, outcome.state, command(args))
    path = report.write(folder.path, read_metrics(folder.metrics))
    report.show(console)
    console.print(f"Report: {path}", soft_wrap=True)
    return 0


def load_text(config: PretrainConfig, folder: RunFolder, console: Console) -> Text:
    """Reads the corpus, trains or loads the tokenizer and cuts batches."""
    settings, model = config.text, config.model
    with console.status("Reading text", spinner="line"):
        corpus = load_corpus(
            settings.data,
            validation_patterns=settings.validation_data,
            on_bad_input=settings.on_bad_input,
        )
    summary = corpus.summary
    console.print(
        f"Text: {summary['source']}: {summary['documents']:,} documents, "
        f"{summary['bytes'] / 1e6:.1f} MB",
        markup=False,
    )
    for reason, count in summary["skipped"].items():
        console.print(f"  skipped {count:,}: {reason}", markup=False)
    with console.status("Tokenizing", spinner="line"):
        if settings.tokenizer is None:
            tokenizer = train_bpe(corpus.train, model.vocab_size, folder.tokenizer)
        else:
            tokenizer = load_tokenizer(settings.tokenizer)
        if tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
                f"{model.vocab_size}: give --model.vocab-size {tokenizer.vocab_size}."
            )
        train_tokens = tokenize(corpus.train, tokenizer)
        validation_tokens = tokenize(corpus.validation, tokenizer)
    return Text(
        batches=train_batches(
            train_tokens,
            batch_size=config.run.batch_size,
            sequence_length=settings.sequence_length,
            seed=config.run.seed,
        ),
        validation=validation_batches(
            validation_tokens,
            # Evaluated in pieces as large as those that training works on.
            batch_size=config.run.batch_size // config.run.microbatches,
            sequence_length=settings.sequence_length,
            max_tokens=settings.validation_tokens,
        ),
        bytes_per_token=validation_tokens.bytes_per_token(settings.validation_tokens),
        identity={
            "text": summary["fingerprint"],
            "tokenizer": tokenizer.fingerprint,
        },
        summary=summary,
    )


def pretrain(
    config: PretrainConfig, folder: RunFolder, text: Text, console: Console
) -> Outcome:
    """Trains a model on `text` in `folder`, from scratch or from its checkpoint."""
    run, steps = config.run, config.run.steps
    mesh = sharding = None
    if config.devices > 1:
        explicit = takes_explicit_axes(config.optimization)
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, explicit=explicit)
        sharding = batch_sharding(mesh)
    init_params, apply = functional_llama(config.model)
    loss_fn = next_token_loss(apply)
    optimizer = build_optimizer(
        config.optimization, learning_rate=config.learning_rate, steps=steps
    )

    def place(batch: Batch) -> Batch:
        return jax.device_put(batch, sharding)

    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        state = create_state(init_params, optimizer, seed=run.seed, mesh=mesh)
        if run.overwrite:
            folder.delete_run()
        checkpointer = stack.enter_context(
            Checkpointer(
                folder.checkpoints,
                keep=run.keep_checkpoints,
                identity=config.identity() | text.identity,
            )
        )
        if run.resume:
            state = checkpointer.restore(state, text.batches)
        folder.write_config(config.as_dict() | {"corpus": dict(text.summary)})
        done = int(state.step)
        return train(
            state,
            step_fn=make_train_step(
                loss_fn,
                optimizer,
                learning_rate_schedule(
                    config.optimization, config.learning_rate, steps
                ),
                microbatches=run.microbatches,
                shardings=None if mesh is None else shardings_of(state),
            ),
            batches=text.batches,
            place=place,
            evaluate=make_validation(loss_fn, place, text),
            plan=Plan(steps, run.eval_every, run.checkpoint_every),
            checkpointer=checkpointer,
            metrics=stack.enter_context(MetricsWriter(folder.metrics, keep_until=done)),
            progress=stack.enter_context(
                ConsoleProgress(console, steps=steps, done=done)
            ),
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


def functional_llama(
    config: LlamaConfig,
) -> tuple[
    Callable[[jax.Array], optax.Params],
    Callable[[optax.Params, jax.Array], jax.Array],
]:
    """Returns a Llama as pure functions: `key -> params`, `params, tokens -> logits`.

    Parameters are nested dictionaries of arrays, which is what optimizers expect.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))

    def init_params(key: jax.Array) -> optax.Params:
        model = Llama(config, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def apply(params: optax.Params, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens)

    return init_params, apply


def make_report(
    config: PretrainConfig, folder: RunFolder, state: TrainState, command: str
) -> Report:
    """Gathers what a finished run has to say."""
    rows = read_metrics(folder.metrics)
    last = rows[-1]
    ours, adamw = ng.state_bytes(state.opt_state), adamw_state_bytes(state.params)
    tokens, seconds = (sum(row[name] for row in rows) for name in ("tokens", "seconds"))
    name = config.optimization.optimizer
    facts = {
        "optimizer": f"{name}, learning rate {config.learning_rate:g}",
        "parameters": f"{optax.tree.size(state.params):,}",
        "steps": f"{last['step']:,} ({tokens:,.0f} tokens)",
        "final validation loss": f"{last['validation_loss']:.4f} nats per token",
        "final validation perplexity": f"{last['validation_perplexity']:.2f}",
        "bits per byte": f"{last['validation_bits_per_byte']:.4f}",
        "optimizer state": megabytes(ours),
        "of which": ", ".join(
            f"{part} {megabytes(size)}"
            for part, size in ng.state_report(state.opt_state).items()
            if size
        ),
        "AdamW's would be": f"{megabytes(adamw)} ({adamw / ours:.1f} times)",
        "time": f"{seconds:,.0f} s ({tokens / seconds:,.0f} tokens/s)",
        "checkpoint": str(folder.checkpoints / str(last["step"])),
    }
    other = "adamw" if name != "adamw" else "natural_galore"
    here = f"{_PROGRAM} --preset {config.preset}"
    return Report(
        title=f"Llama {config.preset} with {name}",
        facts=facts,
        command=command,
        next_steps=(
            (f"The same with {other}, to compare", f"{here} --optimizer {other}"),
            ("A published size", f"{_PROGRAM} --preset llama_60m"),
            ("Text of your own", f"{here} --data 'texts/*.txt' --run-dir runs/mine"),
        ),
    )


def command(args: Sequence[str]) -> str:
    """Returns the command line with these arguments, ready to be pasted."""
    return f"{_PROGRAM} {shlex.join(args)}".strip()


def _resume_command(args: Sequence[str]) -> str:
    kept = [arg for arg in args if arg not in ("--overwrite", "--resume")]
    return command([*kept, "--resume"])


if __name__ == "__main__":
    sys.exit(main())
