"""The linear layer of the models: a kernel, or an adapter in its place."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import lora, placement
from experiments.models.formats import STD, Formats, normal


class Projection(nnx.Module):
    """Linear layer: ``(B, T, m) -> (B, T, n)``.

    Parameters: ``kernel`` ``(m, n)`` and, if asked for, ``bias`` ``(n,)``; with an
    adapter ``lora_a`` ``(m, r)`` and ``lora_b`` ``(r, n)`` beside a frozen ``kernel``,
    or alone (:mod:`lora`). A frozen kernel is the one that the same seed gives without
    adapter.
    """

    def __init__(
        self,
        name: str,
        in_size: int,
        out_size: int,
        config: Formats,
        *,
        rngs: nnx.Rngs,
        adapter: lora.Adapter | None = None,
        bias: bool = False,
    ) -> None:
        self.name = name  # as in the path of its parameter: the mesh rules go by it
        self.remat = config.remat
        self.shape = shape = (in_size, out_size)
        self.adapter = adapter
        key = rngs.params()
        if adapter is None or adapter.kind == "lora":
            self.kernel = nnx.Param(normal(key, shape, config))
        if adapter is not None:
            # Of the kernel's key, lest the keys after it depend on the adapter.
            a, b = adapter.init(
                jax.random.fold_in(key, 1), name, shape, STD, config.param_dtype
            )
            self.lora_a, self.lora_b = nnx.Param(a), nnx.Param(b)
        if bias:
            self.bias = nnx.Param(jnp.zeros(out_size, config.param_dtype))

    def __call__(
        self, x: jax.Array, out_dtype: jax.typing.DTypeLike | None = None
    ) -> jax.Array:
        """Multiply by the weights, accumulating in ``out_dtype`` (default: x's)."""
        adapter, name = self.adapter, self.name

        def kernel_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            kernel = placement.gather_matrix(kernel.astype(x.dtype), name)
            return placement.multiply(x, kernel, name, out_dtype)

        def project(x: jax.Array, weights: lora.Module) -> jax.Array:
            if adapter is None:
                return kernel_product(x, weights["kernel"])
            a, b = weights["lora_a"], weights["lora_b"]
            y = lora.through_factors(x, a, b, adapter.scale, name, out_dtype)
            if "kernel" in weights:
                # Stopped in here: outside, what comes out is no longer the stored
                # kernel, and a copy of it is kept for the backward pass.
                y += kernel_product(x, jax.lax.stop_gradient(weights["kernel"]))
            return y

        if self.remat == "none":
            # Keep the stored weights for the backward pass, not the gathered ones: over
            # the layers of a scan that would be a whole copy of the model. A layer
            # that is recomputed as a whole needs no such care.
            project = jax.checkpoint(project, prevent_cse=False)
        y = project(x, self._weights())
        if not hasattr(self, "bias"):
            return y
        bias = placement.pin_bias(self.bias[...].astype(y.dtype), name, self.shape)
        return y + jnp.expand_dims(bias, range(y.ndim - 1))

    def place_input(self, x: jax.Array) -> jax.Array:
        """Lay an input out on the mesh as the product needs it."""
        name = self.name
        if self.adapter is not None and self.adapter.kind == "low_rank":
            return placement.pin_input(x, f"{name}/lora_a", self.lora_a.shape)
        return placement.pin_input(x, name, self.shape)

    def _weights(self) -> lora.Module:
        names = ("kernel", "lora_a", "lora_b")
        return {name: getattr(self, name)[...] for name in names if hasattr(self, name)}
