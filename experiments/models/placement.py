"""How a model runs on the mesh of :mod:`experiments.training.mesh`.

A sequence's activations come in two layouts. Between blocks its positions are split
over ``tensor`` (where it divides them), so that norms, residual stream, output layer
and loss are neither computed nor kept twice. Inside a block, which needs all positions,
its heads or features are split. Entering a block is an all-gather, leaving it adds up
and splits again: together they move what one all-reduce does.

Activations are pinned to these layouts. Without that the compiler reads a matrix split
on its output side as tensor parallelism, at several times the traffic.

Everything here does nothing without a mesh, and serves explicit and auto axes alike.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from experiments.models import cpu_product
from experiments.training.mesh import RULES, TENSOR


def pin_batch(x: jax.Array) -> jax.Array:
    """Split ``x`` of shape ``(B, ...)`` over the batch axes and nothing else."""
    return _place(x, _spec(x.shape))


def pin_positions(x: jax.Array) -> jax.Array:
    """Split ``x`` ``(B, T, ...)`` over the batch axes and its positions over tensor."""
    return _place(x, _positions(x.shape))


def pin_input(x: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Lay ``x`` ``(B, T, m)`` out for module ``name``, whose kernel is ``(m, n)``.

    For inputs that several modules share: it moves once, not for each of them.
    """
    cut = RULES.cut(name, shape, _axis_sizes())
    if cut is None:
        return pin_positions(x)
    spec = _spec(x.shape)
    if cut == 0:
        return _place(x, P(*spec[:-1], TENSOR))
    if jax.sharding.get_abstract_mesh().are_all_axes_explicit:
        # Its gradients from several modules are added up before they are summed over
        # tensor, not each by itself.
        spec = P(*spec, reduced={TENSOR})
    return _place(x, spec)


def gather_matrix(w: jax.Array, name: str) -> jax.Array:
    """Gather the stored ``(m, n)`` matrix of module ``name`` for use.

    Its gradient is stored like it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return w
    if not mesh.are_all_axes_explicit:
        # An auto array's type does not say where it lives. Naming the stored form
        # here names it in the transpose too, or the gradient would stay gathered.
        w = _place(w, RULES.stored_matrix(name, w.shape, mesh.shape))
    return _place(w, RULES.used_matrix(name, w.shape, mesh.shape))


def pin_bias(b: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Lay a bias ``(n,)`` out like the output of module ``name``, kernel ``(m, n)``."""
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.are_all_axes_explicit):
        b = _place(b, RULES.vector)  # as `gather_matrix` says
    column = RULES.cut(name, shape, _axis_sizes()) == 1
    return _place(b, P(TENSOR if column else None))


def told_sharding(x: jax.Array) -> jax.sharding.NamedSharding | None:
    """Return the sharding of ``x`` if its type says it: not so on auto axes."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = not mesh.empty and mesh.are_all_axes_explicit
    return jax.typeof(x).sharding if explicit else None


def multiply(
    x: jax.Array, w: jax.Array, name: str, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Return ``x w`` of a gathered matrix, in the layout of module ``name``.

    Args:
      x: ``(B, T, m)`` as :func:`pin_input` lays it out; for a module that is cut on its
        input side, m is split over tensor.
      w: ``(m, n)`` from :func:`gather_matrix`.
      name: Name of the module.
      dtype: Format to accumulate in and return, None for that of ``x``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shape = (*x.shape[:-1], w.shape[-1])
    if mesh.size <= 1:
        # As two-dimensional operands: for the gradient of w XLA's CPU compiler copies
        # others into another layout first.
        rows = x.reshape(-1, x.shape[-1])
        if cpu_product.is_asked_for(x):
            return cpu_product.product(rows, w).reshape(shape)
        return jnp.matmul(rows, w, preferred_element_type=dtype).reshape(shape)
    column = RULES.cut(name, w.shape, _axis_sizes()) == 1
    spec = P(*_spec(shape)[:-1], TENSOR) if column else _positions(shape)
    if not mesh.are_all_axes_explicit:
        return _place(jnp.matmul(x, w, preferred_element_type=dtype), spec)
    return jnp.matmul(x, w, preferred_element_type=dtype, out_sharding=spec)


def split_heads(x: jax.Array, head_size: int) -> jax.Array:
    """Reshape ``(B, T, H * K)`` to ``(B, T, H, K)``, every head on one device.

    Raises:
      ValueError: If the tensor axis does not divide the number of heads.
    """
    heads, tensor = x.shape[-1] // head_size, _axis_sizes().get(TENSOR, 1)
    if heads % tensor:
        raise ValueError(
            f"tensor={tensor} does not divide {heads} heads: choose a tensor size that "
            "divides the model's num_heads and num_kv_heads"
        )
    return x.reshape(*x.shape[:-1], heads, head_size)


def pin_heads(x: jax.Array) -> jax.Array:
    """Split ``x`` ``(B, T, H, K)`` over the batch axes and its heads over tensor."""
    batch, *_ = _spec(x.shape)
    return _place(x, P(batch, None, TENSOR, None))


def look_up(table: jax.Array, tokens: jax.Array, name: str) -> jax.Array:
    """Return the rows of the stored table of module ``name`` at tokens.

    Args:
      table: ``(V, D)``, stored by the rules.
      tokens: ``(B, T)`` integers below V.
      name: Name of the module that holds the table.

    Returns:
      ``(B, T, D)`` in the table's dtype, positions split, NaN for a token that is not
      below V.
    """
    # Float32 rows, for the transpose's sake: it adds up one gradient for every time
    # a token occurs, which in bfloat16 stalls at a few hundred.
    rows = gather_matrix(table, name).astype(jnp.float32).at[pin_positions(tokens)]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_explicit:
        found = pin_positions(rows.get(mode="fill"))
    else:
        spec = _positions((*tokens.shape, table.shape[-1]))
        found = rows.get(mode="fill", out_sharding=spec)
    return found.astype(table.dtype)


def _axis_sizes() -> dict[str, int]:
    return dict(jax.sharding.get_abstract_mesh().shape)


def _spec(shape: tuple[int, ...]) -> P:
    """Spec of an array whose batch alone is split."""
    return P(*RULES.batch, *(None,) * (len(shape) - len(RULES.batch)))


def _positions(shape: tuple[int, ...]) -> P:
    """Spec of an array ``(B, T, ...)`` whose positions are split as well."""
    tensor = _axis_sizes().get(TENSOR, 1)
    if tensor == 1 or shape[1] % tensor:
        return _spec(shape)
    batch, _, *rest = _spec(shape)
    return P(batch, TENSOR, *rest)


def _place(x: jax.Array, spec: P) -> jax.Array:
    """Move ``x`` to a spec of the current mesh, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if mesh.are_all_axes_explicit:
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)
