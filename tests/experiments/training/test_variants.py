"""Trials beside the library's subspaces and Fishers, against formulas in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ngalore_jax as ng
from experiments.training import variants

SHAPES = {"one": (2, 3, 5), "two": (4, 6)}  # the first is a batch of two


def stream(steps: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {name: random.normal(size=shape) for name, shape in SHAPES.items()}
        for _ in range(steps)
    ]


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(tx: optax.GradientTransformationExtraArgs, gradients, changes=None):
    """Updates of each step; `changes` gives the subspace change of some of them."""
    state = tx.init(float32(gradients[0]))
    out = []
    for step, gradient in enumerate(gradients):
        change = (changes or {}).get(step)
        more = {} if change is None else {"subspace_change": change}
        updates, state = tx.update(float32(gradient), state, **more)
        out.append(updates)
    return out


def solve(columns: list[np.ndarray], g: np.ndarray, damping: float) -> np.ndarray:
    h = np.stack([c.ravel() for c in columns], axis=1)
    fisher = damping * np.eye(len(h)) + h @ h.T
    return np.linalg.solve(fisher, g.ravel()).reshape(g.shape)


def rotations() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    one = np.stack([np.linalg.qr(random.normal(size=(3, 3)))[0] for _ in range(2)])
    return {"one": one, "two": np.linalg.qr(random.normal(size=(4, 4)))[0]}


def test_the_models_fisher_is_one_of_all_matrices():
    gradients, q = stream(5), rotations()
    change = ng.SubspaceChange(True, float32(q))
    updates = run(variants.scale_by_model_fisher(3, 0.5), gradients, {3: change})
    flat = lambda g: np.concatenate([g[name].ravel() for name in SHAPES])  # noqa: E731
    turned = [{name: q[name] @ g[name] for name in SHAPES} for g in gradients]
    for step, update in enumerate(updates):
        past = [turned[i] if step >= 3 and i < 3 else gradients[i] for i in range(step)]
        window = [flat(g) for g in [*past, gradients[step]]][-3:]
        expected = solve(window, flat(gradients[step]), 0.5)
        np.testing.assert_allclose(flat(update), expected, rtol=1e-3, atol=1e-5)


def test_averages_stand_for_the_history():
    gradients, q = stream(4), rotations()
    change = ng.SubspaceChange(True, float32(q))
    decays = (0.5, 0.9)
    tx = variants.scale_by_averaged_history(0.5, decays)
    updates = run(tx, gradients, {2: change})
    averages = [np.zeros((4, 6)) for _ in decays]
    for step, (gradient, update) in enumerate(zip(gradients, updates, strict=True)):
        g = gradient["two"]
        if step == 2:
            averages = [q["two"] @ a for a in averages]
        scaled = [
            np.sqrt((1 + b) / (1 - b)) * a
            for a, b in zip(averages, decays, strict=True)
        ]
        expected = solve([g, *scaled], g, 0.5)
        np.testing.assert_allclose(update["two"], expected, rtol=1e-3, atol=1e-5)
        averages = [b * a + (1 - b) * g for a, b in zip(averages, decays, strict=True)]


def test_a_batch_has_a_fisher_each():
    gradients = stream(3)
    layers = [{"one": g["one"][1], "two": g["two"]} for g in gradients]
    tx = variants.scale_by_averaged_history(0.5)
    together, alone = run(tx, gradients), run(tx, layers)
    chex.assert_trees_all_close(
        [u["one"][1] for u in together], [u["one"] for u in alone], rtol=1e-5
    )


def gradient_and_basis() -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(2)
    gradient = random.normal(size=(2, 8, 20)) * np.geomspace(1, 1e-2, 8)[:, None]
    basis = np.linalg.qr(random.normal(size=(2, 8, 4)))[0]
    return float32(gradient), float32(basis)


def test_switching_keeps_leading_directions_and_draws_the_others():
    gradient, basis = gradient_and_basis()
    leading = ng.subspace_iteration()(gradient, basis, jnp.int32(7))
    first, second = (
        variants.switching(0.5)(gradient, basis, jnp.int32(count)) for count in (7, 8)
    )
    identity = jnp.broadcast_to(jnp.eye(4), (2, 4, 4))
    gram = jnp.einsum("lmr,lmq->lrq", first, first)
    chex.assert_trees_all_close(gram, identity, atol=1e-5)
    chex.assert_trees_all_close(first[..., :2], leading[..., :2], atol=1e-4)
    overlap = jnp.einsum("lmr,lmq->lrq", first[..., 2:], second[..., 2:])
    assert float(jnp.max(jnp.linalg.norm(overlap, axis=(1, 2)))) < 1.4


def test_averaged_goes_from_the_old_basis_to_the_gradients_own():
    gradient, basis = gradient_and_basis()

    def distance(x: jax.Array, y: jax.Array) -> float:
        overlap = jnp.einsum("lmr,lmq->lrq", x, y)
        return float(jnp.max(4 - jnp.sum(jnp.square(overlap), axis=(1, 2))))

    at = jnp.int32(5)
    near = variants.averaged(1e-3)(gradient, basis, at)
    whole = variants.averaged(1.0)(gradient, basis, at)
    iterated = ng.subspace_iteration()(gradient, basis, at)
    assert distance(near, basis) < 1e-4
    assert distance(whole, iterated) < 1e-3
    assert distance(whole, basis) > 0.5
    first = variants.averaged()(gradient, basis, jnp.int32(0))
    cold = ng.subspace_iteration()(gradient, basis, jnp.int32(0))
    chex.assert_trees_all_close(first, cold)
