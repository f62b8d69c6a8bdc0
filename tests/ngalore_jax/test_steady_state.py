"""A step without a refresh factorises nothing large and sums no Gram matrix anew."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import ngalore_jax as ng

RANK, HISTORY, GAP = 4, 6, 5
SHAPES = {"w": (16, 24), "layers": (3, 24, 16)}

FACTORISATIONS = {"qr", "geqrf", "householder_product", "svd", "eigh", "eig", "lu"}


def tensors():
    return {k: jnp.zeros(shape) for k, shape in SHAPES.items()}


def natural_galore(**changes):
    return ng.natural_galore(
        0.1, rank=RANK, update_proj_gap=GAP, history=HISTORY, **changes
    )


def galore(**changes):
    return ng.galore(0.1, rank=RANK, update_proj_gap=GAP, **changes)


def inner_jaxprs(eqn):
    """Jaxprs among the parameters of an equation."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def equations(jaxpr, in_cond=False):
    """Every equation however nested, and whether it stands in a branch of a cond."""
    for eqn in jaxpr.eqns:
        yield eqn, in_cond
        for inner in inner_jaxprs(eqn):
            yield from equations(inner, in_cond or eqn.primitive.name == "cond")


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


@every_alias
@every_projector
def test_the_steady_step_factorises_no_gradient(make, projector):
    tx = make(projector=projector)
    assert not FACTORISATIONS & names(traced(tx, refresh=False))
    # The same look at the refresh step finds what it looks for.
    assert FACTORISATIONS & names(traced(tx, refresh=True))


@every_alias
@every_projector
def test_one_program_factorises_in_a_branch_only(make, projector):
    inside = [
        in_cond
        for eqn, in_cond in traced(make(projector=projector))
        if eqn.primitive.name in FACTORISATIONS
    ]
    assert inside and all(inside)


def test_the_only_cholesky_is_of_the_history():
    for refresh in (False, True):
        shapes = [
            eqn.invars[0].aval.shape
            for eqn, _ in traced(natural_galore(), refresh=refresh)
            if eqn.primitive.name == "cholesky"
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
        return set(re.findall(r'custom_call_target="lapack_s(\w+?)(?:_ffi)?"', program))

    assert calls(refresh=False) <= {"potrf", "trsm"}
    assert "geqrf" in calls(refresh=True)
