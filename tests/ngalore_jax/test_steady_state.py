"""What a step does not do.

It copies no history. Without a refresh it factorises nothing large, sums no Gram
matrix anew, and between devices that share the kept side it moves a few numbers a
matrix.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngalore_jax as ng
from tests.collectives import elements_by_dtype

RANK, HISTORY, GAP = 4, 6, 5
SHAPES = {"w": (16, 24), "layers": (3, 24, 16)}

# Of a gradient or a basis; the natural gradient's own Cholesky is HISTORY wide.
FACTORISATIONS = {"qr", "geqrf", "householder_product", "svd", "eigh", "eig", "lu"}


def tensors():
    return {k: jnp.zeros(shape) for k, shape in SHAPES.items()}


def natural_galore(**changes):
    """With a residual that needs no product of matrices, unless others are asked."""
    settings = dict(update_proj_gap=GAP, history=HISTORY, residual=1.0)
    return ng.natural_galore(0.1, RANK, **{**settings, **changes})


def galore(**changes):
    return ng.galore(0.1, rank=RANK, update_proj_gap=GAP, **changes)


def inner_jaxprs(eqn):
    """Jaxprs among the parameters of an equation."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def equations(jaxpr, in_loop=False):
    """Every equation however nested, and whether it stands in a refresh's loop.

    That one goes on while the first thing that it carries is true: it computes nothing
    to find out.
    """
    for eqn in jaxpr.eqns:
        yield eqn, in_loop
        refreshes = (
            eqn.primitive.name == "while" and not eqn.params["cond_jaxpr"].jaxpr.eqns
        )
        for inner in inner_jaxprs(eqn):
            yield from equations(inner, in_loop or refreshes)


def traced(tx, **extra_args):
    """The equations of one update."""
    params = tensors()
    update = lambda g, s, p: tx.update(g, s, p, **extra_args)  # noqa: E731
    jaxpr = jax.make_jaxpr(update)(params, tx.init(params), params)
    return list(equations(jaxpr.jaxpr))


def names(pairs):
    return {eqn.primitive.name for eqn, _ in pairs}


def grams(pairs):
    """Products that make an (..., s, s) matrix; no other side is ``s`` long."""
    return [
        eqn
        for eqn, _ in pairs
        if eqn.primitive.name == "dot_general"
        and eqn.outvars[0].aval.shape[-2:] == (HISTORY, HISTORY)
    ]


PROJECTORS = {
    "subspace_iteration": ng.subspace_iteration(),
    "svd": ng.svd(),
    "eigh": ng.eigh(),
    "gaussian": ng.gaussian(),
}
every_projector = pytest.mark.parametrize(
    "projector", PROJECTORS.values(), ids=PROJECTORS
)
every_alias = pytest.mark.parametrize("make", [galore, natural_galore])


def factorises(eqn):
    """Whether an equation factorises something of the subspace's size or larger."""
    name = eqn.primitive.name
    return name in FACTORISATIONS or (
        name == "cholesky" and eqn.invars[0].aval.shape[-1] == RANK
    )


@every_alias
@every_projector
def test_the_steady_step_factorises_no_gradient(make, projector):
    tx = make(projector=projector)
    assert not any(factorises(eqn) for eqn, _ in traced(tx, refresh=False))
    # The same look at the refresh step finds what it looks for.
    assert any(factorises(eqn) for eqn, _ in traced(tx, refresh=True))


@every_alias
@every_projector
def test_one_program_factorises_only_in_the_loop_of_a_refresh(make, projector):
    inside = [
        in_loop for eqn, in_loop in traced(make(projector=projector)) if factorises(eqn)
    ]
    assert inside and all(inside)


def test_the_only_other_cholesky_is_of_the_history():
    for refresh in (False, True):
        shapes = [
            eqn.invars[0].aval.shape
            for eqn, _ in traced(natural_galore(), refresh=refresh)
            if eqn.primitive.name == "cholesky" and not factorises(eqn)
        ]
        assert sorted(shapes) == [(3, HISTORY, HISTORY), (HISTORY, HISTORY)]


def test_the_gram_matrix_is_summed_at_a_refresh_only():
    assert not grams(traced(natural_galore(), refresh=False))
    assert len(grams(traced(natural_galore(), refresh=True))) == len(SHAPES)
    kept = natural_galore(history_at_refresh="keep")
    assert not grams(traced(kept, refresh=True))


def test_no_product_is_larger_than_the_projection():
    """The largest sum of a steady step is P^T G: m n r multiplications a matrix."""
    sizes = []
    for eqn, _ in traced(natural_galore(), refresh=False):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            sizes.append(eqn.outvars[0].aval.size * summed)
    assert max(sizes) == 3 * 16 * 24 * RANK


@every_alias
def test_compiled_steady_program_calls_no_factorisation(make):
    """As above, after XLA: of LAPACK's routines on CPU, the small solve's alone."""
    tx, params = make(), tensors()
    state = tx.init(params)

    def calls(refresh):
        update = jax.jit(lambda g, s, p: tx.update(g, s, p, refresh=refresh))
        program = update.lower(params, state, params).compile().as_text()
        return re.findall(
            r",(\d+)\].*custom_call_target=\"lapack_s(\w+?)(?:_ffi)?\"", program
        )

    assert {name for _, name in calls(refresh=False)} <= {"potrf", "trsm"}
    assert (str(RANK), "potrf") not in calls(refresh=False)
    assert (str(RANK), "potrf") in calls(refresh=True)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("refresh", [None, False])
def test_a_step_holds_no_second_history(dtype, refresh):
    tx = ng.natural_galore(0.1, rank=64, history=64, history_dtype=dtype, residual=1.0)
    params = {"w": jnp.zeros((128, 512)), "layers": jnp.zeros((3, 512, 128))}
    state = tx.init(params)
    update = jax.jit(
        lambda g, s, p: tx.update(g, s, p, refresh=refresh), donate_argnums=1
    )
    memory = update.lower(params, state, params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < ng.state_report(state)["history"] / 2


def communicated(tx, spec, **extra_args):
    """Elements by dtype that the collectives of one compiled update produce."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    specs = {"layers": P(None, *spec), "w": P(*spec)}
    with jax.set_mesh(mesh):
        params = {
            k: jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=NamedSharding(mesh, specs[k])
            )
            for k, shape in SHARDED.items()
        }
        state = jax.eval_shape(tx.init, params)
        update = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra_args))
        return elements_by_dtype(update.lower(params, state, params).compile())


SHARDED = {"w": (8, 16), "layers": (3, 8, 16)}
MATRICES = 1 + 3
# One flag a matrix: a NaN on one device makes the matrix's gradient zero on all.
FLAGS = {"pred": MATRICES}


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        pytest.param(galore(), FLAGS, id="galore"),
        pytest.param(
            natural_galore(residual=None),
            # A row of the Gram matrix.
            FLAGS | {"f32": HISTORY * MATRICES},
            id="natural_galore",
        ),
        pytest.param(
            natural_galore(),
            # And the norm that the residual's limiter looks at.
            FLAGS | {"f32": (HISTORY + 1) * MATRICES},
            id="natural_galore with residual",
        ),
    ],
)
def test_with_the_kept_side_sharded_a_steady_step_communicates_scalars(tx, expected):
    assert communicated(tx, (None, "x"), refresh=False) == expected


def test_with_the_projected_side_sharded_the_low_rank_gradient_is_reduced():
    """Also shows that the count above sees a collective when there is one."""
    traffic = communicated(galore(), ("x", None), refresh=False)
    assert traffic["f32"] == RANK * 16 * MATRICES
