"""One run in its folder: from scratch, or on from its newest checkpoint.

What all commands that train have in common; what differs between them is a `Job`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from experiments.assembly import Parts, mesh_of, step_of
from experiments.configs.run import TrainingConfig
from experiments.data.batches import Batches, Share
from experiments.files import alone
from experiments.training import distributed
from experiments.training.checkpoint import Checkpointer
from experiments.training.folder import RunFolder
from experiments.training.loop import Outcome, Plan, train
from experiments.training.mesh import batch_sharding
from experiments.training.metrics import MetricsWriter, NullMetrics, read_metrics
from experiments.training.microbatches import Batch
from experiments.training.mirrors import open_mirrors
from experiments.training.progress import ConsoleProgress
from experiments.training.state import abstract_like, create_state, shardings_of
from experiments.training.step_log import Row


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a run computes.

    Attributes:
        place: Puts this process' rows of a batch on the devices.
        share: Which rows these are.
        mesh: Of the devices; None for one alone.
    """

    place: Callable[[Batch], Batch]
    share: Share
    mesh: jax.sharding.Mesh | None

    @property
    def whole(self) -> NamedSharding | None:
        """Sharding of what every device is to have as a whole; None for one alone."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run trains, on what, and how it is judged.

    Attributes:
        parts: Model, loss, optimizer.
        plan: Steps, evaluations, checkpoints.
        batches: To train on; closed in the end.
        evaluate: Metrics of given parameters, `validation_loss` among them.
        fingerprints: Of the data: a run goes on with the same ones only.
        data: What they are, for config.json.
        throughput: What a step's tokens (or `parts.unit`) and seconds add to its row.
        objective: Of the metrics of an evaluation, which its checkpoint is judged by:
            lower is better.
        pretrained: Returns parameters like the given ones with values to start from.
            None: training starts from initial ones.
        finish: Takes the best checkpoint's parameters when the run is at its end.
        may_diverge: Whether a run of which no evaluation was finite is a result as
            well, which ends without `finish`.
    """

    parts: Parts
    plan: Plan
    batches: Batches
    evaluate: Callable[[optax.Params], Row]
    fingerprints: Mapping[str, Any]
    data: Mapping[str, Any]
    throughput: Callable[[float, float], Row]
    objective: Callable[[Row], float | None] = lambda row: row["validation_loss"]
    pretrained: Callable[[optax.Params], optax.Params] | None = None
    finish: Callable[[optax.Params], None] | None = None
    may_diverge: bool = False


def run(
    config: TrainingConfig,
    folder: RunFolder,
    prepare: Callable[[Layout], Job],
    console: Console,
) -> Outcome:
    """Trains in `folder`.

    Args:
        config: Where and how.
        folder: The run's.
        prepare: Reads the data and makes the job; the first that takes time.
        console: Where progress is shown.

    Returns:
        How it ended; of the last state the shapes alone, where `Job.finish` has had
        the best one, for devices need not hold both.

    Raises:
        ValueError: Settings, data or checkpoints do not fit; also what `train` raises.
        OSError: A file cannot be read or written.
    """
    settings = config.run
    with contextlib.ExitStack() as stack:
        with distributed.agreed():
            if distributed.is_first():
                folder.claim(
                    resume=settings.resume,
                    auto_resume=settings.auto_resume,
                    overwrite=settings.overwrite,
                )
                stack.enter_context(alone(folder.path, "give another --run-dir"))
            layout = lay_out(config, console)
            job = prepare(layout)
        stack.callback(job.batches.close)
        if layout.mesh is not None:
            stack.enter_context(jax.set_mesh(layout.mesh))
        return _carry_out(job, config, folder, layout, console, stack)


def lay_out(config: TrainingConfig, console: Console) -> Layout:
    """Returns where a config's run computes.

    Raises:
        ValueError: There are not as many devices, or processes would do without some.
    """
    there = jax.device_count()
    console.print(f"On {config.devices} x {jax.devices()[0].device_kind}.")
    if config.devices < there:
        unused = f"{config.devices} of {there} devices are used"
        if jax.process_count() > 1:
            raise ValueError(
                f"{unused}, but processes train together on all of them: choose "
                f"--mesh.data, --mesh.fsdp and --mesh.tensor whose product is {there}."
            )
        console.print(f"{unused}; --mesh.fsdp {there} uses all of them.")
    if config.devices == 1:
        return Layout(jax.device_put, Share(), None)
    mesh = mesh_of(config)
    place = distributed.BatchPlacement(batch_sharding(mesh))
    return Layout(place, place.share, mesh)


def reporter(console: Console) -> Callable[[str], None]:
    """Returns a function that prints a line as it is: paths may hold brackets."""
    return lambda line: console.print(line, markup=False, soft_wrap=True)


def _carry_out(
    job: Job,
    config: TrainingConfig,
    folder: RunFolder,
    layout: Layout,
    console: Console,
    stack: contextlib.ExitStack,
) -> Outcome:
    """Trains; what has to be closed in the end goes onto `stack`."""
    run, mesh, report = config.run, layout.mesh, reporter(console)
    state = create_state(
        job.parts.init_params,
        job.parts.optimizer,
        seed=run.seed,
        mesh=mesh,
        pretrained=job.pretrained,
    )
    settings = config.as_dict() | dict(job.data)
    with distributed.agreed():
        if run.overwrite and distributed.is_first():
            folder.delete_run()

    checkpointer = stack.enter_context(
        Checkpointer(
            folder.checkpoints,
            keep=run.keep_checkpoints,
            identity=config.identity() | {"fingerprints": dict(job.fingerprints)},
            config=settings,
            report=report,
        )
    )
    state = checkpointer.start(
        state, job.batches, resume=run.resume, auto_resume=run.auto_resume
    )
    done = int(state.step)
    metrics, earlier = NullMetrics(), []
    with distributed.agreed():
        if distributed.is_first():
            if run.auto_resume and done == 0:
                folder.check_restart(settings, job.plan.checkpoint_every)
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
    outcome = train(
        state,
        step_fn=step_of(
            config, job.parts, None if mesh is None else shardings_of(state)
        ),
        batches=job.batches,
        place=layout.place,
        evaluate=job.evaluate,
        objective=job.objective,
        unit=job.parts.unit,
        plan=job.plan,
        checkpointer=checkpointer,
        metrics=stack.enter_context(metrics),
        progress=stack.enter_context(
            ConsoleProgress(
                console, steps=job.plan.steps, done=done, unit=job.parts.unit
            )
        ),
        earlier=earlier,
        throughput=job.throughput,
    )
    if outcome.stopped_by is not None or job.finish is None:
        return outcome
    if job.may_diverge and not checkpointer.has_best:
        report("No evaluation was finite: there is no model to save.")
        return outcome
    last = abstract_like(outcome.state)
    best = checkpointer.best(outcome.state)
    with distributed.agreed():  # so that none leaves while the first one writes
        job.finish(best.params)
    return dataclasses.replace(outcome, state=last)
