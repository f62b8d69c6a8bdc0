"""What every command that trains is told: folder, devices, method."""

import abc
import dataclasses
from pathlib import Path
from typing import Any

import tyro

from experiments.configs.optimizer import DEFAULT_LEARNING_RATE, OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How it runs, and where it is kept.

    Attributes:
        batch_size: Sequences per step.
        microbatches: Pieces that a batch is worked off in, to save memory of
            activations; evaluations work on one at a time, too. None: as few as keep
            a piece at --rows-at-once sequences per device.
        rows_at_once: Sequences of a piece on a device, at most, where --microbatches
            is None.
        seed: Seed of the parameters and of the order of the data.
        keep_checkpoints: Number of checkpoints kept, the newest ones. Of those saved
            at a step that was evaluated, the best one is kept besides.
        max_skipped: Steps in a row whose loss or gradient is not finite, each of which
            is skipped, before the run stops.
        run_dir: Folder of the run. None: one in runs/, named after what is run.
        checkpoint_dir: Folder or bucket (gs://...) of the checkpoints. None:
            RUN_DIR/checkpoints.
        resume: Go on from the newest good checkpoint; on the same devices bit for bit.
            Give the same settings as before.
        auto_resume: Start the run, or go on with it where it has been started: for
            schedulers, which start the same command again.
        overwrite: Delete the run that is in the run's folder and start afresh.
        wandb: Weights & Biases project to log to as well (`uv sync --group wandb`).
    """

    batch_size: int = 512
    microbatches: int | None = None
    # Of 256 tokens and 32,000 logits each: 5.4 GB of temporaries for the 60M Llama
    # (python -m experiments.compile_tpu --model llama_60m --topology v5e:4x4
    # --model.dtype bfloat16).
    rows_at_once: int = 32
    seed: int = 0
    keep_checkpoints: int = 2
    max_skipped: int = 10
    run_dir: Path | None = None
    checkpoint_dir: str | None = None
    resume: bool = False
    auto_resume: bool = False
    overwrite: bool = False
    wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices to spread over; 1 x 1 x 1 runs on one device.

    Attributes:
        data: Devices over which batches are split and weights are copied.
        fsdp: Devices over which batches, weights and optimizer state are split.
        tensor: Devices over which heads, feed-forward width, weights and optimizer
            state are split, and a batch is not.
        distributed: Join the processes of a cluster (`jax.distributed.initialize`)
            that TPU pods, SLURM, Open MPI and Kubernetes describe to JAX; elsewhere
            JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    distributed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(abc.ABC):
    """What is the same for whatever is trained; a command adds data and model.

    Attributes:
        run: How it runs, and where it is kept.
        optimization: How it is learnt.
        mesh: Devices to spread over.

    Raises:
        ValueError: A setting is out of range, or two do not fit each other.
    """

    run: tyro.conf.OmitArgPrefixes[RunConfig]
    optimization: tyro.conf.OmitArgPrefixes[OptimizerConfig]
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        run, rest = self.run, self.optimization
        check_at_least(1, run, "batch_size", "keep_checkpoints", "max_skipped")
        check_at_least(1, run, "rows_at_once")
        check_at_least(0, run, "seed")
        check_at_least(1, self.mesh, "data", "fsdp", "tensor")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(rest, name) <= 1:
                raise ValueError(f"{name}={getattr(rest, name)} must be from 0 to 1.")
        for name in ("learning_rate", "adam_learning_rate"):
            if getattr(rest, name) is not None:
                check_at_least(0, rest, name)
        if rest.clip_norm is not None and rest.clip_norm <= 0:
            raise ValueError(
                f"clip_norm={rest.clip_norm} must be positive; None does not clip."
            )
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(rest, name) < 1:
                raise ValueError(f"{name}={getattr(rest, name)} must be in [0, 1).")
        split = self.mesh.data * self.mesh.fsdp
        if run.microbatches is not None:
            check_at_least(1, run, "microbatches")
        pieces = (run.microbatches or 1) * split
        if run.batch_size % pieces:
            raise ValueError(
                f"batch_size={run.batch_size} must be a multiple of microbatches="
                f"{run.microbatches or 1} times the {split} devices (data x fsdp) that "
                f"a batch is split over, {pieces}."
            )
        if (run.resume or run.auto_resume) and run.overwrite:
            raise ValueError("--resume keeps a run, --overwrite deletes it: give one.")
        if rest.accumulate == "subspace":
            _check_subspace_accumulation(rest)
        if rest.relora_gap is not None:
            check_at_least(1, rest, "relora_gap")

    @property
    def devices(self) -> int:
        """Number of devices the run takes."""
        return self.mesh.data * self.mesh.fsdp * self.mesh.tensor

    @property
    def microbatches(self) -> int:
        """Pieces of a batch, the default resolved."""
        if self.run.microbatches is not None:
            return self.run.microbatches
        rows = self.run.batch_size // (self.mesh.data * self.mesh.fsdp)
        return next(
            pieces
            for pieces in range(1, rows + 1)
            if rows % pieces == 0 and rows // pieces <= self.run.rows_at_once
        )

    @property
    def microbatch_size(self) -> int:
        """Sequences of a piece, of all devices together."""
        return self.run.batch_size // self.microbatches

    @property
    def accumulation_steps(self) -> int | None:
        """Microbatches that the optimizer adds up itself; None where it does not."""
        subspace = self.optimization.accumulate == "subspace"
        return self.microbatches if subspace and self.microbatches > 1 else None

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What is run, as the name of a folder."""

    @property
    def run_dir(self) -> Path:
        """The run's folder, its default resolved."""
        return self.run.run_dir or Path("runs") / self.name

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the matrices, its default resolved."""
        if self.optimization.learning_rate is not None:
            return self.optimization.learning_rate
        return DEFAULT_LEARNING_RATE[self.optimization.optimizer]

    def as_dict(self) -> dict[str, Any]:
        """Returns the config, defaults resolved, as JSON would give it back."""
        config = _jsonable(dataclasses.asdict(self))
        config["run"]["run_dir"] = str(self.run_dir)
        # What is left of `rows_at_once` is the number of microbatches.
        for name in ("resume", "auto_resume", "overwrite", "rows_at_once"):
            del config["run"][name]
        config["run"]["microbatches"] = self.microbatches
        rates = config["optimization"]
        rates["learning_rate"] = self.learning_rate
        if rates["adam_learning_rate"] is None:
            rates["adam_learning_rate"] = self.learning_rate
        return config

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal for one run to go on from another's state.

        Left out: where the run lies, how often it saves and evaluates, on which
        devices it runs and what it computes twice there, and where its data lie;
        their fingerprints are for the caller to add.
        """
        config = self.as_dict()
        del config["mesh"], config["model"]["remat"]
        for name in ("batch_size", "seed"):
            config[name] = config["run"][name]
        # Elsewhere pieces change rounding only, as the mesh that they may follow does.
        if self.optimization.accumulate == "subspace":
            config["microbatches"] = self.microbatches
        del config["run"]
        return config

    def decisive(self) -> dict[str, Any]:
        """Returns all that decides what comes of a run, but for its data.

        More than its identity, which says whose state it may go on from.
        """
        config = self.identity()
        config["model"]["remat"] = self.as_dict()["model"]["remat"]
        return config | {"microbatches": self.microbatches}


def check_at_least(least: int, group: Any, *names: str) -> None:
    """Refuses settings of a group that are below the least that is allowed."""
    for name in names:
        value = getattr(group, name)
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


def _check_subspace_accumulation(config: OptimizerConfig) -> None:
    needs = {
        "--optimizer galore or natural_galore": config.optimizer
        in ("galore", "natural_galore"),
        "--residual None, for the residual needs the whole gradient": (
            config.residual is None
        ),
        "--fisher matrix, as trials do not accumulate": config.fisher == "matrix",
        "--clip-norm None, for the whole gradient's norm is not known": (
            config.clip_norm is None
        ),
    }
    missing = [what for what, there in needs.items() if not there]
    if missing:
        raise ValueError(f"--accumulate subspace needs {'; '.join(missing)}.")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value
