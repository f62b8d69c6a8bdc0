"""Which leaves are projected, and how an N-D leaf is a batch of matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngalore_jax as ng
from ngalore_jax.matrices import matrix_view, resolve_dimension_numbers

MATRIX = jax.ShapeDtypeStruct((8, 8), jnp.float32)

PROJECTED = [
    # Flax linen
    "params/layers_0/attention/query/kernel",
    "params/layers_0/attention/out/kernel",
    "params/layers_0/multi_head_attention/kernel",
    "params/encoder/MultiHeadDotProductAttention_0/key/kernel",
    "params/Dense_0/kernel",
    # Flax NNX and hand-written JAX
    "layers/mlp/gate",
    "layers/attention/q_proj/kernel",
    "blocks/w_up",
    # Hugging Face: Llama, BERT, RoBERTa, GPT-2
    "model/layers/0/self_attn/o_proj/weight",
    "model/layers/0/mlp/down_proj/weight",
    "bert/encoder/layer/0/attention/output/dense/kernel",
    "bert/encoder/layer/0/output/dense/kernel",
    "roberta/encoder/layer/3/intermediate/dense/kernel",
    "transformer/h/0/attn/c_attn/kernel",
    # Looks like one of the names below, but is none
    "layers/headway/kernel",
    "layers/outputs_mixer/kernel",
    "layers/bridge/kernel",
]
FULL_RANK = [
    # embeddings, anywhere in the path
    "params/embed/embedding",
    "params/Embed_0/embedding",
    "model/embed_tokens/weight",
    "token_embedding/kernel",
    "tok_embeddings/weight",
    "tok_emb/weight",
    "pos_emb",
    "bert/embeddings/position_embeddings/embedding",
    "unembed/kernel",
    "unembedding",
    "patch_embed/proj/kernel",
    "transformer/wte/embedding",
    "transformer/wpe",
    # output layers, as the leaf or the module that holds it
    "lm_head/kernel",
    "lm_head",
    "model/lm_head/weight",
    "head/kernel",
    "head",
    "Head/kernel",
    "output/weight",
    "output",
    "output_layer/kernel",
    "logits/kernel",
    "decoder/logits_dense/kernel",
    "classifier/kernel",
    # norms and stacked vectors
    "layers/attention_norm/scale",
    "layers/LayerNorm_0/scale",
    "layers/RMSNorm_0/weight",
    "layers/ln_1/weight",
    "layers/mlp/up/bias",
]


def nested(path, leaf):
    """``{"a": {"b": leaf}}`` for ``a/b``."""
    for name in reversed(path.split("/")):
        leaf = {name: leaf}
    return leaf


def is_projected(tree):
    (spec,) = resolve_dimension_numbers(tree, None)
    return spec is not None


@pytest.mark.parametrize("path", PROJECTED)
def test_matrices_are_projected(path):
    assert is_projected(nested(path, MATRIX))


@pytest.mark.parametrize("path", FULL_RANK)
def test_embeddings_outputs_and_norms_are_not(path):
    assert not is_projected(nested(path, MATRIX))


def test_vectors_and_scalars_are_not():
    tree = {"w": jax.ShapeDtypeStruct((8,), "float32"), "c": jnp.zeros(())}
    assert resolve_dimension_numbers(tree, None) == [None, None]


def test_stacked_layers_keep_their_names_rule():
    stacked = jax.ShapeDtypeStruct((4, 8, 8), jnp.float32)
    tree = {"layers": {"q": stacked, "norm": {"scale": MATRIX}}, "head": stacked}
    specs = ng.default_dimension_numbers(tree)
    assert specs["layers"]["q"] == ng.MatrixDimensionNumbers(-2, -1)
    assert specs["layers"]["norm"]["scale"] is None
    assert specs["head"] is None


def test_sequences_of_parameters():
    tree = [MATRIX, (MATRIX, {"lm_head": MATRIX})]
    specs = resolve_dimension_numbers(tree, None)
    assert [spec is not None for spec in specs] == [True, True, False]


def nnx_state():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(8, 4, rngs=rngs)
            self.query = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 8, rngs=rngs)

    return nnx, nnx.state(Model(nnx.Rngs(0)), nnx.Param)


def projected_paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    specs = resolve_dimension_numbers(tree, None)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), spec in zip(leaves, specs)
        if spec is not None
    ]


def test_default_rule_on_a_pure_nnx_state():
    nnx, state = nnx_state()
    assert projected_paths(nnx.as_pure(state)) == ["query/kernel"]


def test_default_rule_on_an_nnx_state_of_variables():
    _, state = nnx_state()
    assert projected_paths(state) == ["query/kernel/value"]


def test_one_spec_is_for_every_leaf_of_two_or_more_dimensions():
    spec = ng.MatrixDimensionNumbers(0, 1)
    tree = {"a": MATRIX, "b": jnp.zeros(3), "lm_head": MATRIX}
    assert resolve_dimension_numbers(tree, spec) == [spec, None, spec]


@pytest.mark.parametrize("as_function", [False, True])
def test_a_tree_of_specs_or_a_function_that_returns_one(as_function):
    spec = ng.MatrixDimensionNumbers(0, (1, 2))
    tree = {"attention": jnp.zeros((8, 2, 4)), "b": jnp.zeros(3), "mlp": MATRIX}
    specs = {"attention": spec, "b": None, "mlp": None}
    given = (lambda params: specs) if as_function else specs
    assert resolve_dimension_numbers(tree, given) == [spec, None, None]
    state = ng.low_rank(optax.trace(0.9), 2, weight_dimension_numbers=given).init(tree)
    assert jax.tree.map(jnp.shape, state.projector["attention"]) == (8, 2)
    assert isinstance(state.projector["mlp"], optax.MaskedNode)
    assert state.inner.trace["mlp"].shape == (8, 8)


@pytest.mark.parametrize(
    "spec",
    [
        optax.contrib.GaLoreDimensionNumbers(0, (1, 2)),
        optax.contrib.MuonDimensionNumbers(0, (1, 2)),
    ],
)
def test_optax_dimension_numbers_mean_the_same(spec):
    g = np.random.default_rng(0).normal(size=(8, 2, 3)).astype(np.float32)
    results = []
    for given in (spec, ng.MatrixDimensionNumbers(0, (1, 2))):
        for form in (given, {"w": given}):
            tx = ng.low_rank(optax.identity(), 2, weight_dimension_numbers=form)
            updates, _ = tx.update({"w": g}, tx.init({"w": g}))
            results.append(np.asarray(updates["w"]))
    assert all(np.array_equal(results[0], r) for r in results[1:])


def test_a_masked_leaf_belongs_to_another_transformation():
    tree = {"a": MATRIX, "b": optax.MaskedNode()}
    spec = ng.MatrixDimensionNumbers()
    for given in (None, spec, {"a": spec, "b": None}, {"a": spec, "b": spec}):
        assert resolve_dimension_numbers(tree, given) == [spec]


VIEWS = [
    # shape, rows, columns, side, rank -> batch, m, n
    ((8, 6), -2, -1, "left", (), 8, 6),
    ((8, 6), -2, -1, "right", (), 6, 8),
    ((8, 6), -2, -1, "smaller", (), 6, 8),
    ((8, 6), -2, -1, "larger", (), 8, 6),
    ((5, 8, 6), -2, -1, "left", (5,), 8, 6),
    ((8, 2, 3), 0, (1, 2), "left", (), 8, 6),
    ((2, 3, 8), (0, 1), 2, "left", (), 6, 8),
    ((2, 8, 3), (0, 2), 1, "right", (), 8, 6),
    ((4, 5, 8, 2, 3), 2, (-2, -1), "left", (4, 5), 8, 6),
]


@pytest.mark.parametrize(("shape", "rows", "columns", "side", "batch", "m", "n"), VIEWS)
def test_views_and_their_inverses(shape, rows, columns, side, batch, m, n):
    dims = ng.MatrixDimensionNumbers(rows, columns)
    view = matrix_view(shape, dims, 2, side, clip_rank=False)
    assert (view.batch_shape, view.m, view.n, view.rank) == (batch, m, n, 2)
    leaf = jnp.arange(np.prod(shape)).reshape(shape)
    matrix = view.to_matrix(leaf)
    assert matrix.shape == (*batch, m, n)
    assert np.array_equal(view.from_matrix(matrix), leaf)


@pytest.mark.parametrize(
    ("rows", "columns", "match"),
    [
        (0, 0, "name the same axis"),
        ((0, 1), -1, "name the same axis"),
        (0, 2, "names axis 2 of a leaf of shape .8, 6., which has 2 axes"),
        (-3, 1, "names axis -3"),
    ],
)
def test_axes_that_do_not_fit_are_errors(rows, columns, match):
    dims = ng.MatrixDimensionNumbers(rows, columns)
    tx = ng.low_rank(optax.identity(), 2, weight_dimension_numbers=dims)
    with pytest.raises(ValueError, match=match):
        tx.init({"w": jnp.zeros((8, 6))})


def test_an_axis_named_twice_on_one_side_is_an_error():
    dims = ng.MatrixDimensionNumbers((0, -2), 1)
    with pytest.raises(ValueError, match="axis"):
        matrix_view((8, 6), dims, 2, "left", clip_rank=False)


def test_anything_but_specs_is_an_error():
    tree = {"w": MATRIX, "b": jnp.zeros(3)}
    for wrong in (
        {"w": 3, "b": None},
        {"w": True, "b": None},
        {"w": "left", "b": None},
    ):
        with pytest.raises(TypeError, match="MatrixDimensionNumbers or None"):
            resolve_dimension_numbers(tree, wrong)
    spec = ng.MatrixDimensionNumbers()
    with pytest.raises(ValueError, match="fewer than two dimensions; give it None"):
        resolve_dimension_numbers(tree, {"w": spec, "b": spec})
    with pytest.raises(ValueError):
        resolve_dimension_numbers(tree, {"w": spec})


def test_rank_rules():
    dims = ng.MatrixDimensionNumbers()
    with pytest.raises(ValueError, match=r"rank=7 .* 8 x 6 .* clip_rank=True to use 6"):
        matrix_view((3, 8, 6), dims, 7, "smaller", clip_rank=False)
    for side in ("smaller", "larger", "left", "right"):
        assert matrix_view((3, 8, 6), dims, 7, side, clip_rank=True).rank == 6
        assert matrix_view((3, 8, 6), dims, 6, side, clip_rank=False).rank == 6
