"""On eight devices: the numbers of one device, and shardings as documented.

All leaves are views of one stack of eight 8 x 16 matrices (the side of 8 is
projected), so that one unsharded run is the reference of all of them.
"""

import functools
import inspect
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngalore_jax as ng
from tests.ngalore_jax.transforms import NAMES, TRANSFORMS, low_rank_state, make

RANK, HISTORY, GAP, STEPS = 2, 2, 2, 3  # refreshes at 0 and 2
STACK, MATRIX, KERNEL = (8, 8, 16), (8, 16), (8, 8, 2)


class Layout(NamedTuple):
    """How a leaf is sharded, and how the documentation says its state is."""

    shape: tuple[int, ...]
    spec: P
    basis: P  # of the (..., m, r) basis
    low: P  # of what has shape (..., r, n)

    @property
    def batch(self):
        """Batch axes: those in front of a basis."""
        return self.basis[:-2]

    def view(self, stack):
        """The part of the stack that this leaf is."""
        return stack if self.shape == STACK else stack[0].reshape(self.shape)


MESHES = {"x": ((8,), ("x",)), "xy": ((4, 2), ("x", "y"))}
XY = ("x", "y")
LAYOUTS = {
    "matrix, projected side": Layout(
        MATRIX, P("x", None), P(None, None), P(None, None)
    ),
    "matrix, kept side": Layout(MATRIX, P(None, "x"), P(None, None), P(None, "x")),
    "stack, batch": Layout(STACK, P("x"), P("x", None, None), P("x", None, None)),
    "stack, projected side": Layout(
        STACK, P(None, "x"), P(None, None, None), P(None, None, None)
    ),
    "stack, kept side": Layout(
        STACK, P(None, None, "x"), P(None, None, None), P(None, None, "x")
    ),
    "kernel, major kept axis": Layout(
        KERNEL, P(None, "x"), P(None, None), P(None, "x")
    ),
    "kernel, minor kept axis": Layout(
        (8, 2, 8), P(None, None, "x"), P(None, None), P(None, None)
    ),
}
LAYOUTS_2D = {
    "matrix, both sides": Layout(MATRIX, P("x", "y"), P(None, None), P(None, "y")),
    "matrix, kept side twice": Layout(MATRIX, P(None, XY), P(None, None), P(None, XY)),
    # The rank of 2 divides y, and only where the kept side is whole is it split.
    "matrix, projected side and rank": Layout(
        MATRIX, P("y", None), P(None, None), P("y", None)
    ),
    "stack, projected side and rank": Layout(
        STACK, P(None, "y"), P(None, None, None), P(None, "y", None)
    ),
    "stack, batch and kept side": Layout(
        STACK, P("x", None, "y"), P("x", None, None), P("x", None, "y")
    ),
}
CASES = [
    pytest.param(mesh, layout, id=name)
    for mesh, layouts in (("x", LAYOUTS), ("xy", LAYOUTS_2D))
    for name, layout in layouts.items()
]


def make_mesh(name, axis_type):
    shape, names = MESHES[name]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names))


def natural_galore(**changes):
    def dimension_numbers(params):
        spec = ng.MatrixDimensionNumbers()
        return jax.tree.map(
            lambda p: (
                spec if p.shape[-1] == 16 else ng.MatrixDimensionNumbers(0, (1, 2))
            ),
            params,
        )

    return ng.natural_galore(
        0.1,
        RANK,
        GAP,
        history=HISTORY,
        weight_decay=0.1,
        weight_dimension_numbers=dimension_numbers,
        # Sums in another order would tip a number over to the next of 8 bits' levels.
        **{"history_dtype": None, "residual": 2.0} | changes,
    )


# Parameters, then one gradient a step. In NumPy, where no mesh sees them, and exact
# in bfloat16.
STACKS = (
    np.random.default_rng(0)
    .normal(size=(1 + STEPS, *STACK))
    .astype(jnp.bfloat16)
    .astype(np.float32)
)


def train(tx, leaf_of, init=None):
    """Updates of every step, and the state before and after each."""
    params, *gradients = [{"w": leaf_of(x)} for x in STACKS]
    states, updates = [(init or tx.init)(params)], []
    update = jax.jit(tx.update)
    for gradient in gradients:
        update_, state = update(gradient, states[-1], params)
        updates.append(update_["w"])
        states.append(state)
    return updates, states


@functools.cache
def unsharded():
    return train(natural_galore(), jnp.asarray)[0]


def documented(layout):
    """Specs of the state of one leaf, in the order of ``natural_galore``'s state."""
    low, batch = layout.low, layout.batch
    return {
        "basis": layout.basis,
        "history": P(None, *low),
        "gram": P(*batch, None, None),
        "mu": low,
        "nu": low,
        "energy": P(*batch, low[-1]),
        "norm": P(*batch),
    }


def parts(state):
    """The state of the one leaf, under the names of ``documented``."""
    state = low_rank_state(state)
    natural, adam = state.inner
    return {
        "basis": state.projector["w"],
        "history": natural.history["w"],
        "gram": natural.gram["w"],
        "mu": adam.mu["w"],
        "nu": adam.nu["w"],
        "energy": state.residual.energy["w"],
        "norm": state.residual.norm["w"],
    }


def specs(arrays):
    """Explicit specs, an entry an axis, of arrays or abstract arrays."""
    found = {k: jax.typeof(x).sharding.spec for k, x in arrays.items()}
    return {k: P(*p, *[None] * (arrays[k].ndim - len(p))) for k, p in found.items()}


def types(tree):
    return jax.tree.map(jax.typeof, tree)


@pytest.mark.parametrize(("mesh", "layout"), CASES)
def test_explicit_axes(mesh, layout):
    tx, mesh = natural_galore(), make_mesh(mesh, AxisType.Explicit)
    sharding = NamedSharding(mesh, layout.spec)
    with jax.set_mesh(mesh):
        updates, states = train(tx, lambda x: jax.device_put(layout.view(x), sharding))
        abstract = _abstract(mesh, layout.shape, layout.spec)
        shapes = jax.eval_shape(tx.init, {"w": abstract})
    batch = (8,) if layout.shape == STACK else ()
    assert parts(states[0])["basis"].shape == (*batch, 8, RANK)
    assert parts(states[0])["mu"].shape == (*batch, RANK, 16)
    assert specs(parts(shapes)) == documented(layout)
    for state in states:
        assert specs(parts(state)) == documented(layout)
        assert types(state) == types(states[0])
    for update, expected in zip(updates, unsharded(), strict=True):
        assert update.sharding.is_equivalent_to(sharding, update.ndim)
        np.testing.assert_allclose(update, layout.view(expected), rtol=1e-4, atol=1e-6)


AUTO = ("matrix, projected side", "stack, kept side")


@pytest.mark.parametrize("layout", [LAYOUTS[k] for k in AUTO], ids=AUTO)
def test_automatic_axes(layout):
    """With the state placed by the ``out_shardings`` of ``init``."""
    mesh, tx = make_mesh("x", AxisType.Auto), natural_galore()
    shapes = jax.eval_shape(tx.init, {"w": layout.view(STACKS[0])})
    low = parts(shapes)["mu"].shape
    placed = jax.tree.map(
        lambda x: NamedSharding(mesh, layout.low if x.shape == low else P()), shapes
    )
    sharding = NamedSharding(mesh, layout.spec)
    updates, states = train(
        tx,
        lambda x: jax.device_put(layout.view(x), sharding),
        jax.jit(tx.init, out_shardings=placed),
    )
    mu = parts(states[0])["mu"]
    assert mu.sharding.is_equivalent_to(NamedSharding(mesh, layout.low), mu.ndim)
    assert parts(states[0])["basis"].shape[-2:] == (8, RANK)
    for update, expected in zip(updates, unsharded(), strict=True):
        np.testing.assert_allclose(update, layout.view(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("projector", [ng.svd(), ng.eigh(), ng.gaussian()])
def test_every_projector_factorises_a_sharded_side(projector):
    tx = ng.galore(0.1, RANK, GAP, projector=projector)
    expected, _ = train(tx, jnp.asarray)
    mesh = make_mesh("x", AxisType.Explicit)
    sharding = NamedSharding(mesh, P(None, "x"))
    with jax.set_mesh(mesh):
        updates, states = train(tx, lambda x: jax.device_put(x, sharding))
    basis = low_rank_state(states[-1]).projector["w"]
    assert basis.shape == (8, 8, RANK)
    assert types(states[-1]) == types(states[0])
    for update, target in zip(updates, expected, strict=True):
        np.testing.assert_allclose(update, target, rtol=1e-3, atol=1e-5)


def test_bfloat16_leaves():
    """The same numbers as for float32 leaves, rounded at the end."""
    sharding = NamedSharding(make_mesh("x", AxisType.Explicit), P(None, None, "x"))
    with jax.set_mesh(sharding.mesh):
        updates, states = train(
            natural_galore(),
            lambda x: jax.device_put(x.astype(jnp.bfloat16), sharding),
        )
    assert parts(states[-1])["mu"].dtype == jnp.float32
    assert types(states[-1]) == types(states[0])
    for update, expected in zip(updates, unsharded(), strict=True):
        assert update.dtype == jnp.bfloat16
        # Rounded three times, the terms of up to 0.2 before they cancel.
        np.testing.assert_allclose(
            update.astype(np.float32), expected, rtol=2**-6, atol=1e-3
        )


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_int8_state(kind):
    """Integers with the documented shardings, and the numbers of one device."""
    small = dict.fromkeys(("history_dtype", "moments_dtype", "basis_dtype"), "int8")
    tx = natural_galore(**small, residual=ng.orthogonal())
    expected, _ = train(tx, jnp.asarray)
    layout, mesh = LAYOUTS["stack, kept side"], make_mesh("x", kind)
    sharding = NamedSharding(mesh, layout.spec)
    with jax.set_mesh(mesh):
        updates, states = train(tx, lambda x: jax.device_put(x, sharding))
    assert types(states[-1]) == types(states[0])
    if kind == AxisType.Explicit:
        integers, scales = (
            [x for x in jax.tree.leaves(states[-1]) if x.dtype in dtypes]
            for dtypes in (("int8", "uint8"), ("bfloat16",))
        )
        assert len(integers) == len(scales) == 5
        split = [jax.typeof(x).sharding.spec[-1] for x in (*integers, *scales)]
        # All but the basis, whose rows are whole on every device.
        assert split.count("x") == 8 and split.count(None) == 2
    for update, target in zip(updates, expected, strict=True):
        np.testing.assert_allclose(update, target, rtol=1e-4, atol=1e-6)


def test_natural_gradient_outside_low_rank():
    """History and Gram follow the leaf, whichever of its axes are sharded."""
    tx = ng.scale_by_natural_gradient(HISTORY)
    mesh = make_mesh("x", AxisType.Explicit)
    leaves = {
        "vector": (STACKS[0, 0, 0], P("x"), P(None, "x"), P(None, None)),
        "rows": (STACKS[0, 0], P("x"), P(None, "x", None), P(None, None)),
        "stack": (STACKS[0], P("x"), P(None, "x", None, None), P("x", None, None)),
    }
    values = {k: jnp.asarray(v[0]) for k, v in leaves.items()}
    expected, _ = jax.jit(tx.update)(values, tx.init(values))
    with jax.set_mesh(mesh):
        placed = {
            k: jax.device_put(v[0], NamedSharding(mesh, v[1]))
            for k, v in leaves.items()
        }
        updates, state = jax.jit(tx.update)(placed, tx.init(placed))
    assert specs(state.history) == {k: v[2] for k, v in leaves.items()}
    assert specs(state.gram) == {k: v[3] for k, v in leaves.items()}
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-7)


def inject(name):
    """Every number becomes an array, but those that shape the state."""
    factory, kwargs = TRANSFORMS[name]
    shapes = {"inner", "rank", "history", "projector"}
    static = shapes & set(inspect.signature(factory).parameters)
    return optax.inject_hyperparams(factory, static)(**kwargs)


WRAPPERS = {
    "alone": make,
    "apply_if_finite": lambda name: optax.apply_if_finite(make(name), 2),
    "multi_steps": lambda name: optax.MultiSteps(make(name), 2),
    "inject_hyperparams": inject,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_types_are_stable_under_explicit_axes(name, wrap):
    """Traced only: a scan refuses a state whose sharding changes."""
    tx, mesh = wrap(name), make_mesh("xy", AxisType.Explicit)

    def steps(params, state):
        def body(state, _):
            updates, state = tx.update(params, state, params)
            assert types(updates) == types(params)
            return state, None

        return jax.lax.scan(body, state, length=2)[0]

    with jax.set_mesh(mesh):
        params = {
            "w": _abstract(mesh, MATRIX, P("x", "y")),
            "stack": _abstract(mesh, STACK, P("y", None, "x")),
            "bias": _abstract(mesh, (8,), P("x")),
        }
        state = jax.tree.map(
            lambda x: _abstract(mesh, x.shape, jax.typeof(x).sharding.spec, x.dtype),
            jax.eval_shape(tx.init, params),
        )
        jax.eval_shape(steps, params, state)


def _abstract(mesh, shape, spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def test_inside_shard_map_the_callers_mean_or_each_devices_own_layers():
    mesh, tx = make_mesh("x", AxisType.Explicit), ng.natural_galore(0.1, 2, 3)
    stack = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)

    def of_mean(gradient, state):
        return tx.update(jax.lax.pmean(gradient[0], "x"), state)

    def of_own_layers(gradient):
        return tx.update(gradient, tx.init(gradient))

    state = tx.init(stack[0])
    with jax.set_mesh(mesh):
        placed = jax.device_put(stack, NamedSharding(mesh, P("x")))
        whole = jax.device_put(state, NamedSharding(mesh, P()))
        averaged = jax.jit(
            jax.shard_map(of_mean, in_specs=(P("x"), P()), out_specs=P())
        )(placed, whole)
        own, _ = jax.jit(
            jax.shard_map(
                of_own_layers,
                in_specs=P("x"),
                out_specs=(P("x"), P()),
                check_vma=False,
            )
        )(placed)
    expected = jax.jit(tx.update)(np.mean(stack, axis=0), state)
    chex.assert_trees_all_close(averaged, expected, rtol=1e-4, atol=1e-6)
    together, _ = jax.jit(of_own_layers)(stack)
    chex.assert_trees_all_close(own, together, rtol=1e-4, atol=1e-6)
