"""The Llama against an independent NumPy one, and the properties it must have."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.data.sequences import make_row
from experiments.models.llama import (
    PRESETS,
    Llama,
    LlamaConfig,
    parameter_count,
    rope_angles,
    rotate,
)
from experiments.training.mesh import make_mesh
from experiments.training.step import next_token_loss

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    num_layers=3,
    rope_theta=100.0,
)

PUBLISHED_COUNTS = {
    "demo": 1_328_256,
    "small": 6_586_112,
    "llama_9m": 8_995_968,
    "llama_20m": 19_548_416,
    "llama_35m": 35_197_824,
    "llama_40m": 42_392_480,
    "llama_60m": 58_073_600,
    "llama_71m": 70_578_688,
    "llama_100m": 100_117_120,
    "llama_130m": 134_105_856,
    "llama_250m": 247_370_496,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
    "llama_3b": 2_685_831_680,
    "llama_7b": 6_738_415_616,
}


def make(config: LlamaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model with weights large enough for every part to matter."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    rng = np.random.default_rng(0)

    def draw(path: jax.tree_util.KeyPath, w: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, 0.3, w.shape), w.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.as_pure(params))


def apply(graphdef: nnx.GraphDef, params: nnx.State, tokens: np.ndarray) -> jax.Array:
    return jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, tokens)


def random_tokens(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32)


def loss(graphdef: nnx.GraphDef, params: nnx.State, tokens: np.ndarray) -> jax.Array:
    log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))


# ------------------------------------------------------------------------ reference


def reference_logits(
    config: LlamaConfig, params: nnx.State, tokens: np.ndarray
) -> np.ndarray:
    """One sequence at a time, layer by layer and head by head, in float64."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), nnx.to_pure_dict(params))
    embedding = p["embed_tokens"]["embedding"]
    output = embedding.T if config.tie_embeddings else p["lm_head"]["kernel"]

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
        return x / rms * scale

    def sequence(tokens: np.ndarray) -> np.ndarray:
        x = embedding[tokens]
        for i in range(config.num_layers):
            layer = jax.tree.map(lambda w, i=i: w[i], p["layers"])
            h = norm(x, layer["input_norm"]["scale"])
            x = x + reference_attention(config, layer["attention"], h)
            h = norm(x, layer["post_attention_norm"]["scale"])
            gate, up, down = (
                layer["mlp"][f"{name}_proj"]["kernel"]
                for name in ("gate", "up", "down")
            )
            z = h @ gate
            x = x + (z / (1 + np.exp(-z)) * (h @ up)) @ down
        return norm(x, p["norm"]["scale"]) @ output

    return np.stack([sequence(row) for row in tokens])


def reference_attention(
    config: LlamaConfig, weights: dict[str, dict[str, np.ndarray]], x: np.ndarray
) -> np.ndarray:
    """Hugging Face's form: cos and sin over the whole head, halves swapped."""
    q, k, v = (x @ weights[f"{name}_proj"]["kernel"] for name in "qkv")
    length, width = len(x), config.hidden_size // config.num_heads
    frequency = config.rope_theta ** (-np.arange(0, width, 2) / width)
    angle = np.arange(length)[:, None] * np.concatenate([frequency, frequency])[None]

    def turn(y: np.ndarray) -> np.ndarray:
        swapped = np.concatenate([-y[:, width // 2 :], y[:, : width // 2]], axis=1)
        return y * np.cos(angle) + swapped * np.sin(angle)

    heads = []
    for head in range(config.num_heads):
        group = head * config.kv_heads // config.num_heads
        mine = slice(head * width, (head + 1) * width)
        theirs = slice(group * width, (group + 1) * width)
        scores = turn(q[:, mine]) @ turn(k[:, theirs]).T / math.sqrt(width)
        scores[np.triu_indices(length, 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, theirs])
    return np.concatenate(heads, axis=1) @ weights["o_proj"]["kernel"]


@pytest.mark.parametrize(("kv_heads", "tied"), [(None, False), (2, True), (1, False)])
def test_equals_an_unscanned_float64_reference(
    kv_heads: int | None, tied: bool
) -> None:
    config = dataclasses.replace(CONFIG, num_kv_heads=kv_heads, tie_embeddings=tied)
    graphdef, params = make(config)
    tokens = random_tokens((2, 13))
    expected = reference_logits(config, params, tokens)
    with jax.default_matmul_precision("highest"):
        logits = apply(graphdef, params, tokens)
    assert logits.shape == (2, 13, 61) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())


# ----------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", list(PRESETS))
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    c = PRESETS[name]
    layer = 4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size
    formula = (
        2 * c.vocab_size * c.hidden_size
        + c.num_layers * (layer + 2 * c.hidden_size)
        + c.hidden_size
    )
    assert parameter_count(c) == formula == PUBLISHED_COUNTS[name]


def test_tied_and_grouped_models_have_fewer_parameters() -> None:
    demo = PRESETS["demo"]
    tied = dataclasses.replace(demo, tie_embeddings=True)
    assert parameter_count(demo) - parameter_count(tied) == 2048 * 128
    grouped = dataclasses.replace(demo, num_kv_heads=1)
    assert parameter_count(demo) - parameter_count(grouped) == 4 * 2 * 128 * 96


def test_parameters_have_the_documented_paths_and_shapes() -> None:
    _, params = make(CONFIG)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in leaves
    }
    assert shapes == {
        "embed_tokens/embedding": (61, 32),
        "layers/input_norm/scale": (3, 32),
        "layers/attention/q_proj/kernel": (3, 32, 32),
        "layers/attention/k_proj/kernel": (3, 32, 16),
        "layers/attention/v_proj/kernel": (3, 32, 16),
        "layers/attention/o_proj/kernel": (3, 32, 32),
        "layers/post_attention_norm/scale": (3, 32),
        "layers/mlp/gate_proj/kernel": (3, 32, 48),
        "layers/mlp/up_proj/kernel": (3, 32, 48),
        "layers/mlp/down_proj/kernel": (3, 48, 32),
        "norm/scale": (32,),
        "lm_head/kernel": (32, 61),
    }


def test_matrices_start_from_a_normal_of_0_02_and_norms_from_one() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=128, vocab_size=512)
    init = jax.jit(lambda: nnx.as_pure(nnx.state(Llama(config, rngs=nnx.Rngs(0)))))
    for path, w in jax.tree_util.tree_leaves_with_path(init()):
        if path[-1].key == "scale":
            np.testing.assert_array_equal(w, np.ones(w.shape))
            continue
        np.testing.assert_allclose(np.std(w), 0.02, rtol=0.03)
        assert abs(np.mean(w)) < 1e-3
        if w.ndim == 3:  # layers differ
            correlation = np.corrcoef(np.asarray(w).reshape(3, -1))
            assert np.abs(correlation - np.eye(3)).max() < 0.1


def test_graph_is_hashable_and_merges_with_pure_trees_without_recompiling() -> None:
    graphdef, params = make(CONFIG)
    again, _ = make(CONFIG)
    assert hash(graphdef) == hash(again) and graphdef == again
    forward = jax.jit(lambda g, p, t: nnx.merge(g, p)(t), static_argnums=0)
    tokens = random_tokens((1, 5))
    logits = forward(graphdef, params, tokens)
    np.testing.assert_array_equal(logits, forward(again, params, tokens))
    assert forward._cache_size() == 1
    as_dict = nnx.to_pure_dict(params)
    np.testing.assert_array_equal(logits, forward(graphdef, as_dict, tokens))


# ----------------------------------------------------------------------- properties


def test_a_later_token_changes_no_earlier_logit() -> None:
    graphdef, params = make(CONFIG)
    tokens = random_tokens((2, 12))
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % CONFIG.vocab_size
    before, after = (np.asarray(apply(graphdef, params, t)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before - after)[:, 7:].max(axis=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize("mesh", [None, (1, 4, 2)], ids=["one device", "1 x 4 x 2"])
def test_a_packed_row_is_its_documents_alone(mesh: tuple[int, ...] | None) -> None:
    """The first number comes back at the end: what is equal is one segment."""
    config = dataclasses.replace(CONFIG, vocab_size=64)
    graphdef, params = make(config)
    tokens = random_tokens((4, 14))
    parts = (slice(0, 3), slice(3, 8), slice(8, 9), slice(9, 14))
    segments = np.zeros((4, 14), np.int32)
    for number, part in enumerate(parts):
        segments[:, part] = number * 7 - 3
    segments[1, 8:] = segments[1, 0]  # one row packs otherwise
    forward = jax.jit(lambda p, t, s: nnx.merge(graphdef, p)(t, s))
    if mesh is None:
        logits = forward(params, tokens, segments)
    else:
        with jax.set_mesh(make_mesh(*mesh)):
            logits = forward(params, tokens, segments)
    logits = np.asarray(logits)
    for part in parts:
        alone = apply(graphdef, params, tokens[:, part])
        np.testing.assert_allclose(logits[2:, part], alone[2:], atol=1e-4)
    together = np.concatenate([tokens[:, :3], tokens[:, 8:]], axis=1)
    joined = apply(graphdef, params, together)
    # Apart by five more positions than here, so not the same where both are attended.
    np.testing.assert_allclose(logits[1, :3], joined[1, :3], atol=1e-4)
    assert np.abs(logits[1, 8:] - joined[1, 3:]).max() > 1e-3
    whole = np.asarray(apply(graphdef, params, tokens))
    assert np.abs(whole - logits)[:, 3:].max(axis=(0, 2)).min() > 1e-3


def test_the_loss_of_a_packed_row_is_that_of_its_documents() -> None:
    graphdef, params = make(CONFIG)
    loss_fn = next_token_loss(lambda params, *args: nnx.merge(graphdef, params)(*args))
    lengths = (3, 5, 1, 6)
    (tokens,) = random_tokens((1, sum(lengths)))
    row = make_row(tokens, len(tokens) + 3, np.repeat(np.arange(4), lengths))
    loss, weight = loss_fn(params, {name: part[None] for name, part in row.items()})
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    rows = [make_row(one, 5) for one in documents]
    alone = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    expected, targets = loss_fn(params, alone)
    assert float(weight) == float(targets) == sum(lengths) - len(lengths)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_one_segment_is_the_whole_sequence() -> None:
    graphdef, params = make(CONFIG)
    tokens = random_tokens((2, 9))
    logits = nnx.merge(graphdef, params)(tokens, np.full((2, 9), 5, np.int32))
    np.testing.assert_allclose(logits, apply(graphdef, params, tokens), atol=1e-5)


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    length, width = 9, 8
    q, k = np.random.default_rng(0).normal(size=(2, width)).astype(np.float32)
    config = dataclasses.replace(CONFIG, num_kv_heads=None)
    assert config.head_size == width and config.rope_theta == 100
    angles = rope_angles(jnp.arange(length)[None], config)
    turned = [
        rotate(jnp.broadcast_to(x, (1, length, 1, width)), angles)[0, :, 0]
        for x in (q, k)
    ]
    scores = np.asarray(turned[0] @ turned[1].T)
    by_distance = [np.diagonal(scores, d) for d in range(-length + 1, length)]
    for diagonal in by_distance:
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    np.testing.assert_allclose(np.diagonal(scores), q @ k, atol=1e-5)
    assert np.std([diagonal[0] for diagonal in by_distance]) > 0.1


def test_grouped_attention_equals_heads_with_repeated_keys_and_values() -> None:
    graphdef, params = make(CONFIG)
    full_graph, _ = make(dataclasses.replace(CONFIG, num_kv_heads=None))
    repeated = nnx.to_pure_dict(params)
    for name in ("k_proj", "v_proj"):
        kernel = repeated["layers"]["attention"][name]["kernel"]
        by_head = kernel.reshape(3, 32, 2, 8)
        repeated["layers"]["attention"][name] = {
            "kernel": jnp.repeat(by_head, 2, axis=2).reshape(3, 32, 32)
        }
    tokens = random_tokens((2, 9))
    np.testing.assert_allclose(
        apply(graphdef, params, tokens), apply(full_graph, repeated, tokens), atol=1e-4
    )


def test_bfloat16_is_close_to_float32() -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    graphdef, params = make(config)
    tokens = random_tokens((2, 9))
    (value, logits), gradient = jax.jit(
        jax.value_and_grad(
            lambda p: (loss(graphdef, p, tokens), nnx.merge(graphdef, p)(tokens)),
            has_aux=True,
        )
    )(params)
    assert {w.dtype for w in jax.tree.leaves((params, gradient))} == {
        jnp.dtype("bfloat16")
    }
    assert logits.dtype == value.dtype == jnp.float32
    exact = reference_logits(config, params, tokens)
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05  # below 1e-4 it would not have run in bfloat16


def test_embedding_gradient_adds_up_in_float32() -> None:
    # 4096 equal tokens; sums in bfloat16 stop growing at 256 times the addend.
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    embed_tokens = Llama(config, rngs=nnx.Rngs(0)).embed_tokens
    graphdef, params = nnx.split(embed_tokens, nnx.Param)
    tokens = np.full((8, 512), 5, np.int32)
    gradient = jax.jit(
        jax.grad(lambda p: nnx.merge(graphdef, p)(tokens).astype(jnp.float32).sum())
    )(nnx.as_pure(params))["embedding"]
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient[5].astype(np.float32), 4096.0)


def test_a_token_outside_the_vocabulary_gives_nan() -> None:
    graphdef, params = make(CONFIG)
    tokens = random_tokens((2, 6))
    tokens[1, 3] = CONFIG.vocab_size
    logits = np.asarray(apply(graphdef, params, tokens))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1, 3:]).all()


# --------------------------------------------------------------- memory and compiling


def test_remat_gives_the_same_gradient_in_less_memory() -> None:
    tokens = random_tokens((4, 64))
    gradients, memory = [], []
    for remat in ("none", "dots", "layer"):
        config = dataclasses.replace(CONFIG, num_layers=4, remat=remat)
        graphdef, params = make(config)
        grad = jax.jit(jax.grad(lambda p, g=graphdef: loss(g, p, tokens)))
        compiled = grad.lower(params).compile()
        gradients.append(compiled(params))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    for other in gradients[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            gradients[0],
            other,
        )
    none, dots, layer = memory
    assert layer < dots < none and layer < 0.75 * none, memory


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_the_program_does_not_grow_with_depth(remat: str) -> None:
    def equations(num_layers: int) -> int:
        config = dataclasses.replace(CONFIG, num_layers=num_layers, remat=remat)
        graphdef, params = make(config)
        grad = jax.grad(lambda p: loss(graphdef, p, random_tokens((1, 8))))
        return str(jax.make_jaxpr(grad)(params)).count(" = ")

    assert equations(2) == equations(8) > 50


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"num_kv_heads": 0}, "kv_heads must be positive"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"hidden_size": 36}, r"hidden_size=36 must be a multiple of 2 \* num_heads=8"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype must be one of"),
    ],
)
def test_config_refuses_what_makes_no_model(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
