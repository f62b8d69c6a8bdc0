"""A refresh gives every device matrices of its own, and says what that moves.

``STACK`` x 8 x 16 gradients, side of 8 projected, on eight devices.
"""

import collections
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngalore_jax as ng
from tests.collectives import bytes_by_kind
from tests.ngalore_jax.transforms import low_rank_state

M, N, RANK = 8, 16, 2
MESHES = {"x": ((8,), ("x",)), "xy": ((4, 2), ("x", "y"))}
XY, YX = ("x", "y"), ("y", "x")
# Mesh, sharding of the gradient, how many mesh axes move from its sides to the stack.
ANY_AXES = {
    "kept side": ("x", P(None, None, "x"), 1),
    "kept side, copies": ("xy", P(None, None, "y"), 1),
    "both sides": ("xy", P(None, "y", "x"), 2),
    "kept side twice": ("xy", P(None, None, YX), 2),
}
# Here only an explicit type tells that y is the minor axis, or that x has moved.
EXPLICIT_AXES = {
    "kept side twice, in mesh order": ("xy", P(None, None, XY), 2),
    "stack and kept side": ("xy", P("x", None, "y"), 1),
}
CASES = [
    pytest.param(kind, *case, stack, id=f"{kind.name}, {name}, {stack}")
    for kind, cases in (
        (AxisType.Explicit, ANY_AXES | EXPLICIT_AXES),
        (AxisType.Auto, ANY_AXES),
    )
    for name, case in cases.items()
    for stack in ((16,) if case[1][0] else (16, 3))  # x must divide a stack it splits
]
AXES = pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
PROJECTORS = {
    "subspace_iteration": ng.subspace_iteration(),
    "svd": ng.svd(),
    "eigh": ng.eigh(),
    "gaussian": ng.gaussian(),
}


def make_mesh(name, kind):
    shape, axes = MESHES[name]
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))


def transform(projector=None):
    return ng.low_rank(optax.identity(), RANK, 2, projector=projector)


def compiled(mesh, spec, stack, **extra_args):
    """One update, bases placed as documented."""
    tx = transform()
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        gradient = jax.ShapeDtypeStruct((stack, M, N), jnp.float32, sharding=sharding)
        batch = NamedSharding(mesh, P(spec[0]))
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=batch if x.ndim else NamedSharding(mesh, P())
            ),
            jax.eval_shape(tx.init, gradient),
        )
        shardings = (sharding, jax.tree.map(lambda x: x.sharding, state))
        update = jax.jit(
            lambda g, s: tx.update(g, s, **extra_args), out_shardings=shardings
        )
        return update.lower(gradient, state).compile()


def factorised(program):
    """Sizes of the batches of bases that LAPACK factorises."""
    return {
        int(size)
        for size in re.findall(
            r"\(f32\[(\d+),2,2\].*custom_call_target=\"lapack_spotrf", program.as_text()
        )
    }


@pytest.mark.parametrize(("kind", "mesh", "spec", "moved", "stack"), CASES)
def test_each_device_factorises_its_own_matrices(kind, mesh, spec, moved, stack):
    mesh = make_mesh(mesh, kind)
    refresh = compiled(mesh, spec, stack, refresh=True)
    steady = compiled(mesh, spec, stack, refresh=False)
    filled = max(stack, 8)
    assert factorised(refresh) == {filled // 8}
    # The gradient, one's own part of it for every mesh axis that moves; then the bases
    # (the identity inside wants no rotations). Less what a steady step moves as well.
    added = collections.Counter(bytes_by_kind(refresh))
    added.subtract(bytes_by_kind(steady))
    bases = stack * M * RANK // (4 if spec[0] else 1)
    assert added["all-to-all"] == 4 * moved * filled * M * N // 8
    gathered = added["all-gather"] + added["all-reduce"]
    assert gathered == 4 * bases, added
    assert added["collective-permute"] == added["reduce-scatter"] == 0


@AXES
def test_the_refresh_in_a_cond_is_spread_too(kind):
    mesh = make_mesh("x", kind)
    assert factorised(compiled(mesh, P(None, None, "x"), 16)) == {2}


@pytest.mark.parametrize(
    ("mesh", "spec", "stack"),
    [("x", P(None, None, "x"), 1), ("xy", P("x", None, "y"), 4)],
    ids=["one matrix", "one matrix a device already"],
)
def test_what_cannot_be_spread_further_stays_as_it_is(mesh, spec, stack):
    program = compiled(make_mesh(mesh, AxisType.Explicit), spec, stack, refresh=True)
    assert factorised(program) == {1}
    assert set(bytes_by_kind(program)) == {"all-reduce"}


@AXES
@pytest.mark.parametrize(
    ("batch", "mesh", "spec", "name"),
    [
        *[((3,), "xy", P(None, "y", "x"), name) for name in PROJECTORS],
        ((5, 2), "xy", P(None, None, None, XY), "subspace_iteration"),
        ((2, 3), "xy", P("y", None, None, "x"), "subspace_iteration"),
        ((3, 2), "xy", P(None, "y", None, "x"), "gaussian"),  # not spread
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_numbers_are_those_of_one_device(kind, batch, mesh, spec, name):
    """Also where the devices do not divide the matrices, and for a bad one."""
    tx, mesh = transform(PROJECTORS[name]), make_mesh(mesh, kind)
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(3, *batch, M, N)).astype(np.float32)
    gradients[0][0, ..., 0, 0] = np.nan  # on one device alone

    def run(place):
        state = tx.init(place(np.zeros_like(gradients[0])))
        updates, bases, update = [], [], jax.jit(tx.update)
        for gradient in gradients:
            new, state = update(place(gradient), state)
            updates.append(np.asarray(new))
            bases.append(np.asarray(low_rank_state(state).projector))
        return updates, bases

    expected, expected_bases = run(jnp.asarray)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        updates, bases = run(lambda x: jax.device_put(x, sharding))
    assert not np.array_equal(expected_bases[1], expected_bases[2])
    chex.assert_trees_all_close(updates, expected, rtol=1e-3, atol=1e-4)
    if name in ("subspace_iteration", "gaussian"):  # the others choose signs freely
        chex.assert_trees_all_close(bases, expected_bases, rtol=1e-3, atol=1e-4)
