"""What is written with a cache is what the whole model would write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.functional import functional_extend, functional_llama
from experiments.models.generation import Generator, choose, empty_cache
from experiments.training.mesh import make_mesh, param_shardings
from tests.experiments.small_llama import CONFIG, abstract_params

LENGTHS, MOST = (3, 70, 11, 1), 20
TIED = dataclasses.replace(CONFIG, tie_embeddings=True, rope_factor=2.0)


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.normal(0.1, 0.3, w.shape), w.dtype),
        abstract_params(config),
    )


def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in LENGTHS]


def never(tokens):
    return None


def uncached(config, params, prompt, most=MOST):
    """The likeliest token each time, by the forward pass of training."""
    _, apply = functional_llama(config)
    forward = jax.jit(apply)
    tokens = list(prompt)
    for _ in range(most):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(forward(params, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["plain", "tied"])
def test_greedy_equals_the_uncached_forward(config):
    params = random_params(config)
    found = Generator(config, params)(prompts(), MOST, never)
    for prompt, tokens in zip(prompts(), found.tokens, strict=True):
        assert tokens == uncached(config, params, prompt)
    assert len({tuple(tokens) for tokens in found.tokens}) == len(LENGTHS)
    assert found.seconds > 0


def test_logits_are_those_of_the_whole_sequence():
    """Read in three pieces, two sequences from places of their own."""
    params = random_params(TIED)
    _, apply = functional_llama(TIED)
    tokens = np.random.default_rng(2).integers(0, 64, (2, 24)).astype(np.int32)
    expected = np.asarray(jax.jit(apply)(params, tokens))
    extend = jax.jit(functional_extend(TIED))
    cache = empty_cache(TIED, 2, 32)
    at = np.array([0, 0])
    for width, lengths in ((16, (16, 9)), (4, (4, 3)), (1, (1, 1))):
        positions = at[:, None] + np.arange(width)
        piece = np.take_along_axis(tokens, positions, axis=1)
        last = np.array(lengths) - 1
        logits, cache = extend(params, piece, positions, last, cache)
        at = at + lengths
        for row in range(2):
            there = expected[row, at[row] - 1]
            np.testing.assert_allclose(logits[row], there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [(2, 2, 2), (1, 1, 4), (4, 1, 1)], ids=str)
def test_a_mesh_writes_the_same(layout):
    params = random_params(CONFIG)
    expected = Generator(CONFIG, params)(prompts(), MOST, never)
    mesh = make_mesh(*layout, explicit=False)
    shardings = param_shardings(abstract_params(CONFIG), mesh)
    with jax.set_mesh(mesh):
        generator = Generator(CONFIG, jax.device_put(params, shardings))
        assert generator(prompts(), MOST, never).tokens == expected.tokens


def test_the_cache_is_split_like_the_activations():
    mesh = make_mesh(2, 2, 2, explicit=False)
    shardings = param_shardings(abstract_params(CONFIG), mesh)
    with jax.set_mesh(mesh):
        generator = Generator(CONFIG, jax.device_put(random_params(CONFIG), shardings))
        _, cache = generator.prefill(
            np.zeros((4, 8), np.int32), np.full(4, 8, np.int32), slots=16
        )
    layers, batch, slots, heads, width = cache.keys.shape
    (shard, *_) = cache.keys.addressable_shards
    assert shard.data.shape == (layers, batch // 4, slots, heads // 2, width)


def test_rows_end_where_they_are_told_to():
    params = random_params(CONFIG)
    generator = Generator(CONFIG, params)
    whole = generator(prompts(), 64, never)
    stop = whole.tokens[0][3]

    def end(tokens):
        return tokens.index(stop) + 1 if stop in tokens else None

    found = generator(prompts(), 64, end)
    for row, full in zip(found.tokens, whole.tokens, strict=True):
        assert row == full[: end(full)]
    assert len(found.tokens[0]) <= 4
    assert (whole.compiled, found.compiled) == (True, False)
    shorter = generator(prompts()[2:3], 64, end)
    assert shorter.compiled and shorter.tokens[0] == found.tokens[2]


def test_draws_follow_the_temperature_and_the_seed():
    params = random_params(CONFIG)
    generator = Generator(CONFIG, params)

    def at(temperature, seed):
        return generator(prompts(), 16, never, temperature, seed).tokens

    assert at(1.0, 0) == at(1.0, 0) != at(1.0, 1)
    assert at(1e-4, 0) == at(0.0, 0)
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: choose(logits, jnp.float32(0.5), key))(keys)
    chances = np.array([0.01, 0.36, 0.09]) / 0.46
    shares = np.bincount(drawn[:, 0], minlength=3) / len(keys)
    np.testing.assert_allclose(shares, chances, atol=0.03)


def test_prompts_that_are_empty_are_refused():
    generator = Generator(CONFIG, random_params(CONFIG))
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="a prompt has no token"):
            generator(bad, 4, never)


def test_the_cache_s_bytes():
    cache = empty_cache(dataclasses.replace(CONFIG, dtype="bfloat16"), 4, 32)
    width = CONFIG.hidden_size // CONFIG.num_heads
    assert cache.keys.shape == (2, 4, 32, 4, width) == cache.values.shape
    assert cache.keys.dtype == jnp.bfloat16
