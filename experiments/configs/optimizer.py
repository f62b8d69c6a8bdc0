"""How it is learnt: the method, its settings, the learning rates."""

import dataclasses
from typing import Annotated, Literal

import tyro

import ngalore_jax as ng
from experiments.models.lora import Adapter

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

Method = Annotated[OptimizerName, tyro.conf.arg(aliases=("--method",))]

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

Others = Literal["train", "freeze"]
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
        adam_learning_rate: Peak learning rate of all that is on Adam: embeddings,
            norms, biases, output layer or head. None: that of the matrices.
        others: Whether embeddings, norms and biases are trained by Adam, or stay as
            they are. The output layer or head is trained in either case.
        warmup_fraction: Share of the steps, from 0 to 1, in which both learning rates
            rise; then they fall.
        decay: How they fall.
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
            them inside (fira), or its momentum, one byte per element, is orthogonalised
            as by Muon (orthogonal). None: it is dropped, as published (galore,
            natural_galore).
        residual_weight: Factor on it (the same two).
        history_dtype: How the Fisher's gradients are stored (natural_galore).
        moments_dtype: How Adam's moments of the projected matrices are stored (galore,
            natural_galore).
        basis_dtype: How the subspaces are stored (galore, natural_galore); in float32
            with a residual that scales columns.
        accumulate: Where the gradients of microbatches add up. full: as matrices.
            subspace: projected, rank times the kept side instead of the whole matrix
            (galore, natural_galore; with `--residual None`).
        lora_alpha: Numerator of the factor `lora_alpha / rank` on the product of the
            factors (lora, relora).
        relora_gap: Steps after which the factors are merged into the matrices, and
            start afresh (relora). None: a quarter of the run's, as 5,000 of 20,000 in
            arXiv 2307.05695.
    """

    optimizer: Method = "natural_galore"
    learning_rate: float | None = None
    adam_learning_rate: float | None = 3e-3
    others: Others = "train"
    warmup_fraction: float = 0.1
    decay: Literal["cosine", "linear"] = "cosine"
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
