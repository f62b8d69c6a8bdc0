"""``reference``: the published code's numbers, mode by mode."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from tests.ngalore_jax import published

MODES = ("galore", "natural_galore", "online_galore", "online_natural_galore")
SHAPES = {"matrix": (5, 7), "conv": (2, 3, 4, 5), "bias": (6,)}
STEPS, GAP, PEAK = 6, 2, 0.05
RATES = (0.02, 0.05, 0.04, 0.03, 0.02, 0.01)
# All far from their defaults, and from where one could be taken for another.
SETTINGS = dict(
    update_proj_gap=GAP,
    rank=3,
    scale=0.7,
    history=3,
    damping=0.5,
    b1=0.8,
    b2=0.95,
    eps=1e-2,
    weight_decay=0.3,
)


def schedule(count):
    return jnp.asarray(RATES)[count]


def ratio(count):
    return schedule(count) / PEAK / GAP


def stream():
    """Parameters, then a gradient a step."""
    rng = np.random.default_rng(11)
    return [
        {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        for _ in range(1 + STEPS)
    ]


@functools.cache
def trained(mode):
    """Parameters after every step, in float64."""
    with jax.enable_x64(True):
        tx = ng.reference(schedule, mode=mode, factor_learning_rate=ratio, **SETTINGS)
        weights, *gradients = jax.tree.map(jnp.asarray, stream())

        @jax.jit
        def step(weights, state, gradient):
            updates, state = tx.update(gradient, state, weights)
            return optax.apply_updates(weights, updates), state

        state, out = tx.init(weights), []
        for gradient in gradients:
            weights, state = step(weights, state, gradient)
            out.append(jax.tree.map(np.asarray, weights))
    return out


def by_the_code(mode, name):
    """The same of one leaf, from the description of the published code."""
    settings = dict(SETTINGS)
    decay, gap = settings.pop("weight_decay"), settings.pop("update_proj_gap")
    code = published.Published(
        mode if name != "bias" else None, gap=gap, decay=decay, **settings
    )
    w, *gradients = [tree[name] for tree in stream()]
    out = []
    for gradient, rate in zip(gradients, RATES, strict=True):
        w = code.step(w, gradient, rate, rate / PEAK)
        out.append(w)
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_published_numbers(mode, name):
    expected = by_the_code(mode, name)
    for step in range(STEPS):
        np.testing.assert_allclose(
            trained(mode)[step][name], expected[step], rtol=1e-6, atol=1e-8
        )


def test_modes_differ_where_they_say():
    matrices = {mode: [w["matrix"] for w in trained(mode)] for mode in MODES}
    # The Fisher of one gradient is a factor, which eps shows; factors of count 0 serve
    # counts 0 and 1 in every mode, and no other.
    for first, second in (MODES[0::2], MODES[1::2]):
        for step in (0, 1):
            np.testing.assert_allclose(matrices[first][step], matrices[second][step])
        assert not np.allclose(matrices[first][2], matrices[second][2])
    assert not np.allclose(matrices["galore"][1], matrices["natural_galore"][1])


def test_what_is_decayed_is_the_updated_weight():
    g, w = {"bias": jnp.ones(3)}, {"bias": jnp.arange(3.0)}
    change = {}
    for decay in (0.0, 0.5):
        tx = ng.reference(0.1, weight_decay=decay)
        change[decay] = tx.update(g, tx.init(w), w)[0]["bias"]
    decayed = -0.1 * 0.5 * (w["bias"] + change[0.0])
    np.testing.assert_allclose(change[0.5] - change[0.0], decayed, rtol=1e-5)


def test_eps_is_beside_the_uncorrected_root():
    tx = ng.reference(1.0, b1=0.9, b2=0.99, eps=0.1)
    g = {"bias": jnp.asarray([0.5, 2.0])}
    update, _ = tx.update(g, tx.init(g))
    m, v = 0.1 * g["bias"], 0.01 * g["bias"] ** 2
    expected = -(np.sqrt(0.01) / 0.1) * m / (np.sqrt(v) + 0.1)
    np.testing.assert_allclose(update["bias"], expected, rtol=1e-5)


def test_a_bad_gradient_of_a_leaf_with_adam_counts_as_zero():
    weights, good, *_ = jax.tree.map(np.float32, stream())
    tx = ng.reference(0.1, rank=2)
    update, state = jax.jit(tx.update), tx.init(weights)
    bad = {**good, "bias": np.full_like(good["bias"], np.nan)}
    zero = {**good, "bias": np.zeros_like(good["bias"])}
    results = [update(g, state, weights) for g in (bad, zero)]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_function_may_choose_axes_by_shape():
    weights, gradient, *_ = jax.tree.map(np.float32, stream())
    axes = {"matrix": (0, 1), "conv": None, "bias": None}

    def choose(tree):
        return {name: (0, 1) if x.ndim == 2 else None for name, x in tree.items()}

    found = []
    for given in (axes, choose):
        tx = ng.reference(0.1, rank=2, weight_mode_axes=given)
        found.append(tx.update(gradient, tx.init(weights), weights)[0])
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_defaults_are_the_published_ones():
    signature = inspect.signature(ng.reference)
    defaults = {name: p.default for name, p in signature.parameters.items()}
    published_ones = dict(
        rank=128,
        mode="natural_galore",
        update_proj_gap=200,
        scale=0.25,
        history=20,
        damping=1e-3,
        b1=0.9,
        b2=0.999,
        eps=1e-6,
        weight_decay=0.0,
    )
    assert published_ones.items() <= defaults.items()


def test_online_factors_move_at_the_rate_of_the_gap():
    """A constant learning rate is all of its peak."""
    g = {"w": jax.ShapeDtypeStruct((3, 4), "float32")}

    def program(**arguments):
        tx = ng.reference(0.01, 2, "online_galore", 50, **arguments)
        return str(jax.make_jaxpr(tx.update)(g, jax.eval_shape(tx.init, g)))

    assert program() == program(factor_learning_rate=1 / 50)
    assert program() != program(factor_learning_rate=1 / 49)


def test_memory_is_what_the_docstring_says():
    params = {"conv": jax.ShapeDtypeStruct((3, 3, 16, 32), "float32")}
    sides, core, s = 3 * 3 + 3 * 3 + 16 * 8 + 32 * 8, 3 * 3 * 8 * 8, 5
    counters = {"galore": 2, "natural_galore": 3, "online_galore": 3}
    expected = {
        "galore": sides + 2 * core,
        "natural_galore": sides + (2 + s) * core + s * s,
        "online_galore": 3 * sides + 2 * core,
    }
    for mode, elements in expected.items():
        tx = ng.reference(0.01, rank=8, mode=mode, history=s)
        state = jax.eval_shape(tx.init, params)
        # The Adam of other leaves counts too.
        assert ng.state_bytes(state) == 4 * (elements + counters[mode] + 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(rank=0), ValueError, "rank must be at least 1, got 0"),
        (dict(rank=2.0), TypeError, "rank must be an int"),
        (dict(update_proj_gap=0), ValueError, "update_proj_gap must be a whole number"),
        (dict(eps=-1.0), ValueError, "eps must be at least 0"),
        (dict(weight_decay=-0.1), ValueError, "weight_decay must be at least 0"),
        (dict(damping=0.0), ValueError, "damping must be positive"),
        (dict(mode="online"), ValueError, "must be one of galore, natural_galore"),
    ],
)
def test_arguments_out_of_range(arguments, error, message):
    with pytest.raises(error, match=message):
        ng.reference(0.01, **arguments)


def test_a_schedule_does_not_tell_its_peak():
    with pytest.raises(ValueError, match="give factor_learning_rate"):
        ng.reference(schedule, mode="online_galore")
    ng.reference(schedule, mode="galore")


def test_decay_needs_parameters():
    tx = ng.reference(0.01, weight_decay=0.1)
    g = {"bias": jnp.ones(3)}
    with pytest.raises(ValueError, match="third argument"):
        tx.update(g, tx.init(g))
