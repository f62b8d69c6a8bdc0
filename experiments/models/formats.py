"""Number formats of a model, and what its backward pass recomputes."""

from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "layer", "dots"]

STD = 0.02  # of the entries of every matrix: the published runs' initialisation
REMAT_POLICIES = {
    "layer": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Formats(Protocol):
    """What a layer asks of its model's config."""

    @property
    def param_dtype(self) -> Dtype:
        """Format that parameters are stored in."""
        ...

    @property
    def dtype(self) -> Dtype:
        """Format of activations and matrix products."""
        ...

    @property
    def remat(self) -> Remat:
        """What of each layer the backward pass recomputes."""
        ...


def check_positive(config: Formats, *names: str) -> None:
    """Refuse sizes that are not positive."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def check_choices(config: Formats, **more: Any) -> None:
    """Refuse formats, and further settings, that are none of a `Literal`'s."""
    every = more | {"param_dtype": Dtype, "dtype": Dtype, "remat": Remat}
    for name, literal in every.items():
        choices, given = get_args(literal), getattr(config, name)
        if given not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(choices)}, got {given!r}"
            )


def normal(key: jax.Array, shape: tuple[int, int], config: Formats) -> jax.Array:
    """Draw a matrix from N(0, STD^2) in the parameters' format."""
    return jax.nn.initializers.normal(STD)(key, shape, jnp.dtype(config.param_dtype))
