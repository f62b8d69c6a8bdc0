"""The bases: orthonormal, leading, continuous, deterministic."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from ngalore_jax.projectors import first_basis, orthonormal
from tests.ngalore_jax import reference

M, N, R = 12, 16, 3
PROJECTORS = {
    "subspace_iteration": ng.subspace_iteration(),
    "svd": ng.svd(),
    "eigh": ng.eigh(),
    "gaussian": ng.gaussian(),
}
EXACT = ["svd", "eigh"]


def start(*batch, m=M, r=R):
    return jnp.broadcast_to(first_basis(m, r), (*batch, m, r))


def count(step):
    return jnp.asarray(step, jnp.int32)


def gradient(*shape, seed=0):
    return np.float32(reference.gradients(seed, 1, *shape)[0])


def with_spectrum(singular_values, m=M, n=N, seed=0):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(m, m)))
    right, _ = np.linalg.qr(rng.normal(size=(n, n)))
    k = len(singular_values)
    return np.float32(left[:, :k] * singular_values @ right[:, :k].T)


def assert_orthonormal(basis):
    gram = np.asarray(basis, np.float64)
    gram = np.swapaxes(gram, -1, -2) @ gram
    expected = np.broadcast_to(np.eye(gram.shape[-1]), gram.shape)
    chex.assert_trees_all_close(gram, expected, atol=1e-5)


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (2, 3, 7, 7)])
def test_columns_are_orthonormal(name, shape):
    old = start(*shape[:-2], m=shape[-2])
    basis = jax.jit(PROJECTORS[name])(gradient(*shape), old, count(0))
    chex.assert_shape(basis, (*shape[:-1], R))
    chex.assert_type(basis, jnp.float32)
    assert_orthonormal(basis)


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("rank", [1, 7])
def test_extreme_ranks(name, rank):
    g = gradient(7, 9)
    basis = PROJECTORS[name](g, start(m=7, r=rank), count(0))
    assert_orthonormal(basis)
    if rank == 7:
        assert reference.captured_energy(basis, g) > 1 - 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_exact_projectors_span_the_leading_left_singular_vectors(name):
    g = gradient(M, N)
    basis = np.asarray(PROJECTORS[name](g, start(), count(0)), np.float64)
    leading = np.linalg.svd(np.float64(g))[0][:, :R]
    cosines = np.abs(np.sum(basis * leading, axis=0))
    chex.assert_trees_all_close(cosines, np.ones(R), atol=1e-4)


def test_a_cold_start_nearly_captures_the_leading_energy():
    for seed in range(5):
        g = gradient(M, N, seed=seed)
        basis = ng.subspace_iteration()(g, start(), count(0))
        best = reference.best_energy(g, R)
        assert reference.captured_energy(basis, g) > 0.95 * best


@pytest.mark.parametrize(("m", "r"), [(12, 3), (13, 5), (7, 7), (5, 1)])
def test_the_first_basis_is_orthonormal_and_sees_every_row(m, r):
    """It stays for a whole gap where the first gradient is zero."""
    basis = np.asarray(first_basis(m, r))
    assert_orthonormal(basis)
    np.testing.assert_array_equal(np.count_nonzero(basis, axis=1), 1)
    if m > r:
        assert np.min(basis) < 0 < np.max(basis)


def test_a_first_basis_kept_in_bfloat16_still_starts_cold():
    g, first = gradient(M, N), start(r=5)
    stored = first.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.any(stored != first)
    refresh = jax.jit(ng.subspace_iteration())
    chex.assert_trees_all_equal(
        refresh(g, stored, count(0)), refresh(g, first, count(0))
    )


def test_the_cold_start_does_not_depend_on_the_first_basis():
    """Rows that coordinates would never see."""
    g = np.zeros((M, N), np.float32)
    g[R:] = gradient(M - R, N)
    basis = ng.subspace_iteration()(g, start(), count(0))
    best = reference.best_energy(g, R)
    assert reference.captured_energy(basis, g) > 0.95 * best


def test_more_iterations_converge_to_the_svd():
    g = gradient(M, N)
    leading = np.linalg.svd(np.float64(g))[0][:, :R]
    basis = ng.subspace_iteration(200)(g, start(), count(0))
    overlap = np.linalg.norm(leading.T @ np.float64(basis)) ** 2
    assert overlap > R - 1e-4


def test_a_warm_start_goes_on_where_the_last_refresh_ended():
    """With a small gap, many single iterations converge; cold ones never would."""
    g = with_spectrum([1.0, 0.98, 0.96, 0.86, 0.84, 0.82, 0.8])
    leading = np.linalg.svd(np.float64(g))[0][:, :R]
    refresh = jax.jit(ng.subspace_iteration())
    basis, overlaps = start(), []
    for step in range(60):
        basis = refresh(g, basis, count(step))
        overlaps.append(np.linalg.norm(leading.T @ np.float64(basis)) ** 2)
    assert overlaps[0] < R - 0.1
    assert overlaps[-1] > R - 1e-3


def test_a_warm_start_follows_a_drifting_stream_with_continuous_columns():
    rng = np.random.default_rng(0)
    generator = rng.normal(size=(M, M))
    turn = np.linalg.qr(np.eye(M) + 0.02 * (generator - generator.T))[0]
    turn *= np.sign(np.diag(turn))
    g = with_spectrum([10, 8, 6, 1, 0.8, 0.6, 0.4, 0.2])
    refresh = jax.jit(ng.subspace_iteration())
    basis = refresh(g, start(), count(0))
    for step in range(1, 25):
        g = np.float32(turn @ g)
        old, basis = basis, refresh(g, basis, count(step))
        best = reference.best_energy(g, R)
        assert reference.captured_energy(basis, g) > 0.98 * best
        # Column by column, and with its sign: moments can follow.
        assert np.min(np.sum(np.asarray(basis * old), axis=0)) > 0.9


def test_signs_do_not_depend_on_the_sign_of_the_gradient():
    refresh = jax.jit(ng.subspace_iteration())
    g = gradient(M, N)
    basis = refresh(g, start(), count(0))
    chex.assert_trees_all_close(
        refresh(-g, basis, count(1)), refresh(g, basis, count(1)), atol=1e-6
    )


def test_a_gradient_orthogonal_to_the_old_basis_is_found():
    """One set of rows active, then another: experts, dead units, masked heads."""
    first, second = np.zeros((2, M, N), np.float32)
    first[: M // 2] = gradient(M // 2, N)
    second[M // 2 :] = gradient(M // 2, N, seed=1)
    refresh = jax.jit(ng.subspace_iteration())
    basis = refresh(first, start(), count(0))
    basis = refresh(second, basis, count(1))
    assert_orthonormal(basis)
    best = reference.best_energy(second, R)
    assert reference.captured_energy(basis, second) > 0.9 * best


@pytest.mark.parametrize("name", [*EXACT, "subspace_iteration"])
def test_rank_deficient_gradients_still_give_orthonormal_columns(name):
    g = with_spectrum([1.0])
    refresh = jax.jit(PROJECTORS[name])
    basis = start()
    for step in range(3):
        basis = refresh(g, basis, count(step))
        assert_orthonormal(basis)
        assert reference.captured_energy(basis, g) > 1 - 1e-5


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_orthonormal_is_the_q_of_qr_with_a_positive_diagonal(condition):
    x = with_spectrum(np.geomspace(1, 1 / condition, 8), n=8)
    q = jax.jit(orthonormal)(x)
    assert_orthonormal(q)
    expected, triangle = np.linalg.qr(x.astype(np.float64))
    expected *= np.sign(np.diagonal(triangle))
    chex.assert_trees_all_close(q, np.float32(expected), atol=1e-5 + 1e-7 * condition)


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("exponent", [-66, 66])
def test_the_scale_of_the_gradient_does_not_matter(name, exponent):
    """Times 1e-20 and 1e20: bit for bit."""
    project = jax.jit(PROJECTORS[name])
    g, scale = gradient(M, N), np.float32(2.0**exponent)
    expected = project(g, start(), count(0))
    chex.assert_trees_all_equal(project(scale * g, start(), count(0)), expected)


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("exponent", [-66, 40])
def test_nor_does_it_through_low_rank(name, exponent):
    """To 1e12, well below gradients whose squares overflow."""
    tx = ng.low_rank(optax.identity(), R, 1, projector=PROJECTORS[name])
    update = jax.jit(tx.update)
    g, scale = gradient(M, N), np.float32(2.0**exponent)
    u, state = update(g, tx.init(g))
    v, scaled = update(scale * g, tx.init(g))
    chex.assert_trees_all_equal(scaled.projector, state.projector)
    chex.assert_trees_all_close(v / scale, u, rtol=1e-5)


@pytest.mark.parametrize("factory", [ng.subspace_iteration, ng.gaussian])
def test_the_seed_decides_and_nothing_else(factory):
    g, old = gradient(M, N), start()
    one = factory(seed=1)(g, old, count(0))
    chex.assert_trees_all_equal(one, factory(seed=1)(g, old, count(0)))
    assert np.max(np.abs(one - factory(seed=2)(g, old, count(0)))) > 1e-3


def test_gaussian_bases_differ_between_refreshes_and_ignore_the_gradient():
    refresh, old = jax.jit(ng.gaussian(3)), start()
    bases = [refresh(gradient(M, N), old, count(step)) for step in (0, 200, 400)]
    for a, b in itertools.pairwise(bases):
        assert np.linalg.norm(np.asarray(a.T @ b)) ** 2 < 0.8 * R
    other = refresh(gradient(M, N, seed=9), bases[0], count(0))
    chex.assert_trees_all_equal(bases[0], other)


def test_gaussian_bases_are_uniform():
    """The mean of P P^T over draws is (r / m) I."""
    refresh = jax.jit(jax.vmap(ng.gaussian(), in_axes=(None, None, 0)))
    bases = np.float64(refresh(gradient(6, 8), start(m=6, r=2), jnp.arange(2000)))
    mean = np.mean(bases @ np.swapaxes(bases, 1, 2), axis=0)
    chex.assert_trees_all_close(mean, np.eye(6) / 3, atol=0.03)


def test_batches_may_mix_cold_and_warm_matrices():
    g = gradient(2, M, N)
    refresh = jax.jit(ng.subspace_iteration())
    warm = refresh(g[1], start(), count(0))
    mixed = refresh(g, jnp.stack([start(), warm]), count(1))
    chex.assert_trees_all_close(mixed[0], refresh(g[0], start(), count(1)), atol=1e-6)
    chex.assert_trees_all_close(mixed[1], refresh(g[1], warm, count(1)), atol=1e-6)


def test_iterations_below_one_are_an_error():
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        ng.subspace_iteration(0)
