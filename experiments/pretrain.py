"""Pretrains a Llama on text: `python -m experiments.pretrain --help`.

Flow: config -> corpus -> tokens -> batches -> step(state, batch) -> metrics.jsonl ->
evaluation -> checkpoint -> report. The run's folder holds all that is needed to
resume it and to explain it.
"""

import contextlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

import ngalore_jax as ng
from experiments.assembly import mesh_of, parts_of, step_of
from experiments.configs import PretrainConfig
from experiments.data.batches import Share
from experiments.data.text import Text, load_text
from experiments.presets import parse
from experiments.training import distributed
from experiments.training.checkpoint import Checkpointer
from experiments.training.folder import RunFolder
from experiments.training.loop import Outcome, Plan, train
from experiments.training.mesh import batch_sharding
from experiments.training.metrics import MetricsWriter, NullMetrics, read_metrics
from experiments.training.microbatches import Batch, LossFn
from experiments.training.mirrors import open_mirrors
from experiments.training.optimizer import adamw_state_bytes
from experiments.training.progress import ConsoleProgress
from experiments.training.record import first_line
from experiments.training.report import Report, megabytes
from experiments.training.state import TrainState, create_state, shardings_of
from experiments.training.step import make_evaluate
from experiments.training.throughput import Throughput

_PROGRAM = "python -m experiments.pretrain"
if "UV_RUN_RECURSION_DEPTH" in os.environ:  # set by `uv run`, whose python it was
    _PROGRAM = f"uv run {_PROGRAM}"
_INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        config = parse(args)
        if config.mesh.distributed:
            distributed.join()
        console = Console(highlight=False, quiet=not distributed.is_first())
        folder = RunFolder(config.run_dir, config.run.checkpoint_dir)
        outcome = pretrain(config, folder, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"error: the devices' memory is too small ({first_line(error)}). Try more "
            "--microbatches, --model.remat layer, --model.dtype bfloat16 or a larger "
            "--mesh.fsdp.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("Interrupted with nothing new to save.", file=sys.stderr)
        return _INTERRUPTED
    if outcome.stopped_by is not None:
        console.print(
            f"Saved step {int(outcome.state.step)} of {config.run.steps} in "
            f"{folder.checkpoints}. Go on with:\n  {_resume_command(args)}",
            soft_wrap=True,
            markup=False,
        )
    elif distributed.is_first():
        rows = read_metrics(folder.metrics)
        if not any("validation_loss" in row for row in rows):
            console.print("The run is at its end; its metrics are not in this folder.")
            return 0
        report = make_report(config, folder, outcome.state, rows, command(args))
        path = report.write(folder.path, rows)
        report.show(console)
        console.print(f"Report: {path}", soft_wrap=True)
    return outcome.exit_code


def pretrain(config: PretrainConfig, folder: RunFolder, console: Console) -> Outcome:
    """Trains a model in `folder`, from scratch or from its newest checkpoint."""
    run = config.run
    with distributed.agreed():
        if distributed.is_first():
            folder.claim(
                resume=run.resume, auto_resume=run.auto_resume, overwrite=run.overwrite
            )
        place, share, mesh = lay_out(config, console)
        text = load_run_text(config, folder, share, console)
    with contextlib.ExitStack() as stack:
        stack.callback(text.batches.close)
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        return train_on(config, folder, text, place, mesh, console, stack)


def lay_out(
    config: PretrainConfig, console: Console
) -> tuple[Callable[[Batch], Batch], Share, jax.sharding.Mesh | None]:
    """Returns how batches reach the devices, this process' share of them, the mesh."""
    there = jax.device_count()
    if config.devices < there:
        unused = f"{config.devices} of {there} devices are used"
        if jax.process_count() > 1:
            raise ValueError(
                f"{unused}, but processes train together on all of them: choose "
                f"--mesh.data, --mesh.fsdp and --mesh.tensor whose product is {there}."
            )
        console.print(f"{unused}; --mesh.fsdp {there} uses all of them.")
    if config.devices == 1:
        return jax.device_put, Share(), None
    mesh = mesh_of(config)
    place = distributed.BatchPlacement(batch_sharding(mesh))
    return place, place.share, mesh


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
            eval_batch_size=config.run.batch_size // config.microbatches,
            seed=config.run.seed,
            share=share,
            tokenizer_file=folder.tokenizer,
            report=reporter(console),
        )


def reporter(console: Console) -> Callable[[str], None]:
    """Returns a function that prints a line as it is: paths may hold brackets."""
    return lambda line: console.print(line, markup=False, soft_wrap=True)


def train_on(
    config: PretrainConfig,
    folder: RunFolder,
    text: Text,
    place: Callable[[Batch], Batch],
    mesh: jax.sharding.Mesh | None,
    console: Console,
    stack: contextlib.ExitStack,
) -> Outcome:
    """Trains on `text`; what has to be closed in the end goes onto `stack`."""
    run, steps, parts = config.run, config.run.steps, parts_of(config)
    state = create_state(parts.init_params, parts.optimizer, seed=run.seed, mesh=mesh)
    report = reporter(console)
    settings = config.as_dict() | {"corpus": dict(text.summary)}
    with distributed.agreed():
        if run.overwrite and distributed.is_first():
            folder.delete_run()

    checkpointer = stack.enter_context(
        Checkpointer(
            folder.checkpoints,
            keep=run.keep_checkpoints,
            identity=config.identity() | {"fingerprints": text.identity},
            config=settings,
            report=report,
        )
    )
    state = checkpointer.start(
        state, text.batches, resume=run.resume, auto_resume=run.auto_resume
    )
    done = int(state.step)
    metrics, earlier = NullMetrics(), []
    with distributed.agreed():
        if distributed.is_first():
            if run.auto_resume and done == 0:
                folder.check_restart(settings)
            folder.write_config(settings)
            metrics = MetricsWriter(
                folder.metrics,
                keep_until=done,
                mirrors=open_mirrors(
                    folder.path,
                    keep_until=done,
                    wandb_project=run.wandb,
                    config=settings,
                    report=report,
                ),
                report=report,
            )
            earlier = read_metrics(folder.metrics)
    return train(
        state,
        step_fn=step_of(config, parts, None if mesh is None else shardings_of(state)),
        batches=text.batches,
        place=place,
        evaluate=make_validation(parts.loss_fn, place, text),
        plan=Plan(steps, run.eval_every, run.checkpoint_every, run.max_skipped),
        checkpointer=checkpointer,
        metrics=stack.enter_context(metrics),
        progress=stack.enter_context(ConsoleProgress(console, steps=steps, done=done)),
        earlier=earlier,
        throughput=Throughput.of(
            config.model,
            config.text.sequence_length,
            config.devices,
            config.optimization.adapter,
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
    ours, adamw = ng.state_bytes(state.opt_state), adamw_state_bytes(state.params)
    tokens, seconds = (sum(row[name] for row in rows) for name in ("tokens", "seconds"))
    name = config.optimization.optimizer
    facts = {
        "optimizer": f"{name}, learning rate {config.learning_rate:g}",
        "parameters": f"{optax.tree.size(state.params):,}",
        "steps": f"{last['step']:,} ({tokens:,.0f} tokens)",
        "final validation loss": f"{loss:.4f} nats per token",
        "final validation perplexity": f"{perplexity:.2f}",
        "bits per byte": f"{bits:.4f}",
        "optimizer state": megabytes(ours),
        "of which": ", ".join(
            f"{part} {megabytes(size)}"
            for part, size in ng.state_report(state.opt_state).items()
            if size
        ),
        "AdamW's would be": f"{megabytes(adamw)} ({adamw / ours:.1f} times)",
        "time": f"{seconds:,.0f} s ({tokens / seconds:,.0f} tokens/s)",
        "steps skipped": str(sum(row["skipped"] for row in rows)),
        "loss spikes": str(sum("spike" in row for row in rows)),
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
            (
                "A published size, on C4 from the hub",
                f"{_PROGRAM} --preset llama_60m --data c4",
            ),
            ("Text of your own", f"{here} --data 'texts/*.txt' --run-dir runs/mine"),
        ),
    )


def command(args: Sequence[str]) -> str:
    """Returns the command line with these arguments, ready to be pasted."""
    return f"{_PROGRAM} {shlex.join(args)}".strip()


def _resume_command(args: Sequence[str]) -> str:
    dropped = ("--overwrite", "--resume", "--auto-resume")
    kept = [arg for arg in args if arg not in dropped]
    return command([*kept, "--resume"])


if __name__ == "__main__":
    sys.exit(main())
