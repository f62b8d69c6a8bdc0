"""Natural GaLore for optax: low-rank, natural-gradient training of large models."""

from ngalore_jax.aliases import PAPER, galore, natural_galore
from ngalore_jax.inspection import state_bytes, state_report
from ngalore_jax.low_rank import LowRankState, low_rank
from ngalore_jax.matrices import MatrixDimensionNumbers, default_dimension_numbers
from ngalore_jax.moments import scale_by_subspace_adam
from ngalore_jax.natural import NaturalGradientState, scale_by_natural_gradient
from ngalore_jax.orthogonalized import Orthogonal, orthogonal
from ngalore_jax.projectors import eigh, gaussian, subspace_iteration, svd
from ngalore_jax.reference import ReferenceMode, reference
from ngalore_jax.residual import Residual, ResidualState, compensation, fira
from ngalore_jax.subspace import AtRefresh, SubspaceChange

__all__ = [
    "PAPER",
    "AtRefresh",
    "LowRankState",
    "MatrixDimensionNumbers",
    "NaturalGradientState",
    "Orthogonal",
    "ReferenceMode",
    "Residual",
    "ResidualState",
    "SubspaceChange",
    "compensation",
    "default_dimension_numbers",
    "eigh",
    "fira",
    "galore",
    "gaussian",
    "low_rank",
    "natural_galore",
    "orthogonal",
    "reference",
    "scale_by_natural_gradient",
    "scale_by_subspace_adam",
    "state_bytes",
    "state_report",
    "subspace_iteration",
    "svd",
]
