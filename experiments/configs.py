"""Settings of a pretraining run: frozen dataclasses that tyro reads.

The docstrings are the command's ``--help``. `experiments.presets` fills them in.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro

import ngalore_jax as ng
from experiments.models.llama import LlamaConfig
from experiments.models.lora import Adapter

PresetName = Literal[
    "demo",
    "small",
    "llama_9m",
    "llama_20m",
    "llama_35m",
    "llama_40m",
    "llama_60m",
    "llama_71m",
    "llama_100m",
    "llama_130m",
    "llama_250m",
    "llama_350m",
    "llama_1b",
    "llama_3b",
    "llama_7b",
]
Sequences = Literal["joined", "packed", "documents"]
OptimizerName = Literal[
    "adamw",
    "galore",
    "natural_galore",
    "natural_galore_paper",
    "muon",
    "optax_galore",
    "reference",
    "lora",
    "relora",
    "low_rank",
]

# Sequences a device works on at a time, where nothing is said: of 256 tokens and 32,000
# logits each, 5.4 GB of temporaries for the 60M Llama (python -m
# experiments.compile_tpu --model llama_60m --topology v5e:4x4 --model.dtype bfloat16).
_ROWS_AT_ONCE = 32

# Peak learning rate of the matrices where none is given.
DEFAULT_LEARNING_RATE: dict[OptimizerName, float] = {
    "adamw": 1e-3,
    "galore": 8e-3,
    "natural_galore": 4e-3,
    "natural_galore_paper": 1e-2,
    "muon": 6e-3,
    "optax_galore": 8e-3,
    "reference": 1e-2,
    "lora": 2e-3,
    "relora": 2e-3,
    "low_rank": 1e-3,
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, how often, and where it is kept.

    Attributes:
        steps: Optimizer steps.
        batch_size: Sequences a step.
        microbatches: Pieces that a batch is worked off in, to save memory of
            activations. None: as few as keep a piece at 32 sequences a device.
        seed: Seed of the parameters and of the order of the data.
        eval_every: Steps between evaluations on the validation text.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: Number of checkpoints kept, the newest ones. Of those saved
            at a step that was evaluated, the one of the lowest loss is kept besides.
        max_skipped: Steps in a row whose loss or gradient is not finite, each of which
            is skipped, before the run stops.
        run_dir: Folder of the run. None: runs/PRESET-OPTIMIZER.
        checkpoint_dir: Folder or bucket (gs://...) of the checkpoints. None:
            RUN_DIR/checkpoints.
        resume: Go on from the newest good checkpoint; on the same devices bit for bit.
            Give the same settings as before.
        auto_resume: Start the run, or go on with it where it has been started: for
            schedulers, which start the same command again.
        overwrite: Delete the run that is in the run's folder and start afresh.
        wandb: Weights & Biases project to log to as well (`uv sync --group wandb`).
    """

    steps: int = 10_000
    batch_size: int = 512
    microbatches: int | None = None
    seed: int = 0
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    max_skipped: int = 10
    run_dir: Path | None = None
    checkpoint_dir: str | None = None
    resume: bool = False
    auto_resume: bool = False
    overwrite: bool = False
    wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """What is learnt: text, tokenizer, lengths.

    Attributes:
        data: "c4" for the English C4, streamed from the Hugging Face hub; or globs of
            training text: .txt, .jsonl, .json with a text a line, also .gz and .zst.
            None given: the English documentation that comes with the Python
            installation.
        validation_data: Globs of validation text. None given: C4's validation split,
            or a share of the training documents.
        stream: Read the files of `data` (JSON lines in shards, plain or .gz, as C4's)
            while training, instead of all of them into memory first. Needs `tokenizer`
            and `validation_data`. C4 always streams.
        streams: Shards read side by side. The order of the text depends on it, but not
            on the number of processes and workers that share them: a multiple of
            both, a divisor of the batch size, at most the number of shards.
        shuffle_buffer: Sequences among which the order is random within each stream.
            Text in memory is shuffled as a whole instead.
        workers: Processes that read and tokenize ahead on each host. 0: a thread does.
        token_cache: Folder to keep tokens in, memory-mapped, so that a second epoch or
            run does not tokenize again. None: they are not kept.
        sequences: How documents become sequences. joined: one after the other, an
            end-of-document token between, attention across. packed: the same, but
            attention stays within a document. documents: one document each, cut or
            padded, as published for C4. None: documents for C4, joined for other text.
        on_bad_input: Whether a file or record that cannot be read stops the run, or is
            skipped and counted.
        tokenizer: A tokenizer.json or a SentencePiece model, or "t5-base" for the
            hub's. None: t5-base for C4; else a byte-level BPE of as many tokens as the
            model has is trained on the text and kept in the run's folder.
        sequence_length: Tokens of context.
        validation_tokens: Tokens to evaluate on, at most; always the same ones.
    """

    data: tuple[str, ...] = ()
    validation_data: tuple[str, ...] = ()
    stream: bool = False
    streams: int = 8
    shuffle_buffer: int = 1024
    workers: int = 0
    token_cache: Path | None = None
    sequences: Sequences | None = None
    on_bad_input: Literal["error", "skip"] = "error"
    tokenizer: Path | Literal["t5-base"] | None = None
    sequence_length: int = 256
    validation_tokens: int = 131_072

    @property
    def is_c4(self) -> bool:
        """Whether the text is the hub's C4."""
        return self.data == ("c4",)

    @property
    def streamed(self) -> bool:
        """Whether text is read while training."""
        return self.stream or self.is_c4

    @property
    def treatment(self) -> Sequences:
        """How documents become sequences, the default resolved."""
        return self.sequences or ("documents" if self.is_c4 else "joined")


StorageDtype = Literal["float32", "bfloat16", "int8"]
ProjectorName = Literal[
    "subspace_iteration", "svd", "eigh", "gaussian", "switching", "averaged"
]
Fisher = Literal["matrix", "model", "averages"]
ResidualName = Literal["compensation", "fira", "orthogonal"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How it is learnt: method, learning rates, low-rank settings.

    Attributes:
        optimizer: Method for the matrices. natural_galore_paper is Natural GaLore as
            the paper has it (`ngalore_jax.PAPER`), reference as its published code has
            it: both sides projected, two full SVDs. optax_galore is
            optax.contrib.galore, for comparison: a full SVD of every matrix at a
            refresh, so slow. lora and relora freeze the matrices and train two factors
            of rank `rank` beside each, low_rank two factors instead of each; by AdamW.
        learning_rate: Peak learning rate of the matrices. None: the method's own.
        adam_learning_rate: Peak learning rate of embeddings, norms and output layer.
        warmup_fraction: Share of the steps, from 0 to 1, in which both learning rates
            rise; a cosine follows.
        final_fraction: Learning rates at the end, as a share of their peaks.
        weight_decay: Decoupled decay of the matrices, times the learning rate a step.
        clip_norm: Largest norm of the whole gradient. None: it is left as it is.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        momentum: Decay of the momentum that is orthogonalised, in [0, 1) (muon; galore
            and natural_galore with `--residual orthogonal`).
        rank: Directions of the subspace of each matrix (whatever has galore in its
            name, and reference); columns of the first factor (lora, relora, low_rank).
        update_proj_gap: Steps between two choices of the subspace (whatever has galore
            in its name, and reference).
        scale: Factor on the update of a projected matrix (the same).
        projector: How the subspace is chosen (galore, natural_galore). switching and
            averaged are trials: `experiments/training/variants.py` says of what.
        moments_at_refresh: What Adam's moments do when the subspace moves (the same
            two).
        history: Gradients in the Fisher estimate (natural_galore and its paper's,
            reference).
        damping: Damping of the Fisher, squared gradient norms (the same three).
        relative_damping: Whether it is relative to the history's mean energy
            (natural_galore).
        history_at_refresh: What the history does when the subspace moves
            (natural_galore).
        fisher: What it is of: the last gradients of each matrix; trials: those of the
            whole model, or a few averages of each matrix's in place of its history;
            these are in float32, follow the subspace and are damped by `damping`
            as it is, whatever the settings of the history (natural_galore).
        reference_mode: What the published code runs: with or without the Fisher, the
            subspace chosen anew or, online, moved a little every step (reference).
        residual: What becomes of the gradient outside the subspace: its columns are
            scaled by their energy over time (compensation) or as the optimizer scales
            them inside (fira), or its momentum, a byte an element, is orthogonalised
            as by Muon (orthogonal). None: it is dropped, as published (galore,
            natural_galore).
        residual_weight: Factor on it (the same two).
        history_dtype: How the Fisher's gradients are stored (natural_galore).
        moments_dtype: How Adam's moments of the projected matrices are stored (galore,
            natural_galore).
        basis_dtype: How the subspaces are stored (galore, natural_galore).
        accumulate: Where the gradients of microbatches add up. full: as matrices.
            subspace: projected, rank times the kept side instead of the whole matrix
            (galore, natural_galore; with `--residual None`).
        lora_alpha: Numerator of the factor `lora_alpha / rank` on the product of the
            factors (lora, relora).
        relora_gap: Steps after which the factors are merged into the matrices, and
            start afresh (relora). None: a quarter of the run's, as 5,000 of 20,000 in
            arXiv 2307.05695.
    """

    optimizer: OptimizerName = "natural_galore"
    learning_rate: float | None = None
    adam_learning_rate: float = 3e-3
    warmup_fraction: float = 0.1
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    momentum: float = 0.9
    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    projector: ProjectorName = "subspace_iteration"
    moments_at_refresh: ng.AtRefresh = "rotate"
    history: int = 20
    damping: float = 1e-3
    relative_damping: bool = False
    history_at_refresh: ng.AtRefresh = "rotate"
    fisher: Fisher = "matrix"
    reference_mode: ng.ReferenceMode = "natural_galore"
    residual: ResidualName | None = None
    residual_weight: float = 1.0
    history_dtype: StorageDtype = "int8"
    moments_dtype: StorageDtype = "float32"
    basis_dtype: StorageDtype = "float32"
    accumulate: Literal["full", "subspace"] = "full"
    lora_alpha: float = 32.0
    relora_gap: int | None = None

    @property
    def adapter(self) -> Adapter | None:
        """What takes the place of the hidden matrices; None for a method of kernels."""
        match self.optimizer:
            case "lora" | "relora":
                return Adapter("lora", self.rank, self.lora_alpha)
            case "low_rank":
                return Adapter("low_rank", self.rank)
            case _:
                return None

    def restart_gap(self, steps: int) -> int:
        """Returns the steps between ReLoRA's restarts in a run of so many steps."""
        return self.relora_gap or max(1, steps // 4)


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


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a Llama on text with a chosen optimizer.

    Without arguments: a small model on the documentation of this Python installation,
    in minutes on two CPU cores. A preset sets the model's shape and fitting settings;
    whatever else is given takes their place.

    Attributes:
        run: How long, how often, and where it is kept.
        text: What is learnt.
        optimization: How it is learnt. "The matrices" are those of attention and MLP;
            embeddings, norms and output layer are on Adam whatever the method.
        model: Shape and number formats.
        mesh: Devices to spread over.
        preset: A small model for a quick look, or a published Llama size.
    """

    run: tyro.conf.OmitArgPrefixes[RunConfig]
    text: tyro.conf.OmitArgPrefixes[TextConfig]
    optimization: tyro.conf.OmitArgPrefixes[OptimizerConfig]
    model: LlamaConfig
    mesh: MeshConfig = MeshConfig()
    preset: PresetName = "demo"

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        run, rest = self.run, self.optimization
        _check_at_least(1, run, "steps", "batch_size", "eval_every")
        _check_at_least(1, run, "checkpoint_every", "keep_checkpoints", "max_skipped")
        _check_at_least(0, run, "seed")
        _check_at_least(1, self.text, "sequence_length", "validation_tokens")
        _check_at_least(1, self.text, "streams", "shuffle_buffer")
        _check_at_least(0, self.text, "workers")
        _check_at_least(1, self.mesh, "data", "fsdp", "tensor")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(rest, name) <= 1:
                raise ValueError(f"{name}={getattr(rest, name)} must be from 0 to 1.")
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(rest, name) < 1:
                raise ValueError(f"{name}={getattr(rest, name)} must be in [0, 1).")
        tensor, model = self.mesh.tensor, self.model
        if model.num_heads % tensor or model.kv_heads % tensor:
            raise ValueError(
                f"--mesh.tensor {tensor} must divide the {model.num_heads} query "
                f"heads and {model.kv_heads} key-value heads."
            )
        split = self.mesh.data * self.mesh.fsdp
        if run.microbatches is not None:
            _check_at_least(1, run, "microbatches")
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
            _check_at_least(1, rest, "relora_gap")

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
            if rows % pieces == 0 and rows // pieces <= _ROWS_AT_ONCE
        )

    @property
    def accumulation_steps(self) -> int | None:
        """Microbatches that the optimizer adds up itself; None where it does not."""
        subspace = self.optimization.accumulate == "subspace"
        return self.microbatches if subspace and self.microbatches > 1 else None

    @property
    def run_dir(self) -> Path:
        """The run's folder, its default resolved."""
        default = Path("runs") / f"{self.preset}-{self.optimization.optimizer}"
        return self.run.run_dir or default

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
        for name in ("resume", "auto_resume", "overwrite"):
            del config["run"][name]
        config["run"]["microbatches"] = self.microbatches
        config["optimization"]["learning_rate"] = self.learning_rate
        config["text"]["sequences"] = self.text.treatment
        if self.optimization.optimizer == "relora":
            gap = self.optimization.restart_gap(self.run.steps)
            config["optimization"]["relora_gap"] = gap
        return config

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal for one run to go on from another's state.

        Left out: where the run lies, how often it saves and evaluates, on which
        devices it runs, and the paths of text and tokenizer; the fingerprints of
        these two are for the caller to add.
        """
        config = self.as_dict()
        del config["mesh"]
        for name in (
            "data",
            "validation_data",
            "workers",
            "token_cache",
            "on_bad_input",
            "tokenizer",
        ):
            del config["text"][name]
        for name in ("steps", "batch_size", "seed"):
            config[name] = config["run"][name]
        # Elsewhere pieces change rounding only, as the mesh that they may follow does.
        if self.optimization.accumulate == "subspace":
            config["microbatches"] = self.microbatches
        del config["run"]
        return config


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


def _check_at_least(least: int, group: Any, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value
