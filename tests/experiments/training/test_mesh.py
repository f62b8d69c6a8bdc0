"""The mesh rules, and that the Llama computes the same on any mesh.

The rest of the suite's settings give eight CPU devices (tests/conftest.py).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.models.functional import functional_llama
from experiments.models.llama import PRESETS, Llama, LlamaConfig
from experiments.models.lora import Adapter
from experiments.training import mesh as mesh_lib
from experiments.training.step import next_token_loss
from tests.collectives import collectives

BATCH, LENGTH = 8, 20  # no weight has a side of 20, its half, or a batch multiple
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=4,
    num_layers=2,
)
AXES = pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "auto"])


def abstract_params(config: LlamaConfig) -> Any:
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return nnx.as_pure(nnx.state(model, nnx.Param))


def random_params(config: LlamaConfig) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: rng.normal(0.1, 0.3, w.shape).astype(w.dtype), abstract_params(config)
    )


def loss_and_logits(
    config: LlamaConfig, params: Any, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    logits = nnx.merge(graphdef, params)(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), logits


def tokens() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)


def placed(config: LlamaConfig, mesh: Mesh) -> tuple[Any, jax.Array]:
    """The parameters and tokens on a mesh."""
    shardings = mesh_lib.param_shardings(abstract_params(config), mesh)
    params = jax.device_put(random_params(config), shardings)
    return params, jax.device_put(tokens(), mesh_lib.batch_sharding(mesh))


def logits_sharding(mesh: Mesh) -> NamedSharding:
    """Positions are split over tensor, which divides their number."""
    return NamedSharding(mesh, P(("data", "fsdp"), "tensor"))


def value_and_grad(config: LlamaConfig) -> Callable[..., Any]:
    loss = functools.partial(loss_and_logits, config)
    return jax.value_and_grad(loss, has_aux=True)


@functools.cache
def without_mesh(config: LlamaConfig) -> Any:
    return jax.jit(value_and_grad(config))(random_params(config), tokens())


@functools.cache
def compiled(config: LlamaConfig, mesh: Mesh) -> jax.stages.Compiled:
    with jax.set_mesh(mesh):
        return jax.jit(value_and_grad(config)).lower(*placed(config, mesh)).compile()


def assert_same_on_mesh(config: LlamaConfig, mesh: Mesh, tolerance: float) -> None:
    """Compare loss, logits and gradients with those of one device in float32.

    The tolerance is relative, of each array's Euclidean norm.
    """
    (loss, logits), gradient = compiled(config, mesh)(*placed(config, mesh))
    (expected_loss, expected_logits), expected_gradient = without_mesh(
        dataclasses.replace(config, dtype="float32")
    )

    def check(x: jax.Array, expected: jax.Array, sharding: NamedSharding) -> None:
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
        error = np.linalg.norm(np.asarray(x) - np.asarray(expected))
        assert error <= tolerance * np.linalg.norm(expected)

    np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
    check(logits, expected_logits, logits_sharding(mesh))
    shardings = mesh_lib.param_shardings(abstract_params(config), mesh)
    jax.tree.map(check, gradient, expected_gradient, shardings)


# ------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("layout", "explicit"),
    [
        ((2, 4, 1), True),
        ((1, 8, 1), True),
        ((2, 4, 1), False),
        ((8, 1, 1), False),
        ((1, 1, 2), True),
        ((2, 2, 2), True),
        ((2, 2, 2), False),
        ((1, 2, 4), True),
        ((1, 4, 2), False),
    ],
    ids=str,
)
def test_llama_computes_the_same_on_a_mesh(
    layout: tuple[int, int, int], explicit: bool
) -> None:
    mesh = mesh_lib.make_mesh(*layout, explicit=explicit)
    assert_same_on_mesh(CONFIG, mesh, tolerance=1e-5)


@AXES
def test_what_tensor_does_not_divide_is_not_split_by_it(explicit: bool) -> None:
    """The feed-forward width, which works on positions then; those cannot be split."""
    config = dataclasses.replace(CONFIG, intermediate_size=95)
    mesh = mesh_lib.make_mesh(1, 4, 2, explicit=explicit)
    assert_same_on_mesh(config, mesh, tolerance=1e-5)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0))))
    params, batch = placed(CONFIG, mesh)
    with jax.set_mesh(mesh):
        odd = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, batch)
    assert odd.shape[1] == LENGTH + 1
    assert odd.sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh), 3)
    _, expected = without_mesh(CONFIG)[0]
    np.testing.assert_allclose(odd[:, :-1], expected, rtol=1e-3, atol=1e-4)


def test_heads_that_tensor_does_not_divide_are_refused() -> None:
    mesh = mesh_lib.make_mesh(1, 1, 8)
    params, batch = placed(CONFIG, mesh)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="tensor=8 does not divide 4 heads: choose"),
    ):
        jax.eval_shape(lambda p, t: loss_and_logits(CONFIG, p, t), params, batch)


@AXES
def test_a_tied_recomputed_bfloat16_llama_does_too(explicit: bool) -> None:
    config = dataclasses.replace(
        CONFIG,
        num_heads=4,
        num_kv_heads=2,
        tie_embeddings=True,
        remat="layer",
        dtype="bfloat16",
    )
    mesh = mesh_lib.make_mesh(2, 2, 2, explicit=explicit)
    # Rounding alone: 0.0136 at most was measured (k_proj), on jax 0.10.2 and 0.12.0.
    # One device in bfloat16 is no reference, it is off by 0.011 itself.
    assert_same_on_mesh(config, mesh, tolerance=0.02)


@AXES
def test_work_is_spread_whatever_the_layout_of_the_tokens(explicit: bool) -> None:
    mesh = mesh_lib.make_mesh(2, 2, 2, explicit=explicit)
    params, _ = placed(CONFIG, mesh)
    with jax.set_mesh(mesh):
        forward = jax.jit(lambda p, t: loss_and_logits(CONFIG, p, t)[1])
        logits = forward(params, tokens())
    assert logits.sharding.is_equivalent_to(logits_sharding(mesh), 3)


@AXES
def test_only_weights_and_their_gradients_travel(explicit: bool) -> None:
    # A weight read as tensor parallelism would send activations, whose shapes hold
    # the length.
    mesh = mesh_lib.make_mesh(2, 4, explicit=explicit)
    program = compiled(CONFIG, mesh).as_text()
    travelling = re.findall(
        r"= (.*) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
        r"(?:-start)?\(",
        program,
    )
    assert len(travelling) > 8  # seven kernels of a layer are gathered, at least
    sides = {
        int(n) for shape in travelling for n in re.findall(r"(?<=[\[,])\d+", shape)
    }
    assert {32, 96} <= sides
    assert not sides & {LENGTH, LENGTH + 1, BATCH * LENGTH, BATCH * (LENGTH + 1)}


def test_tensor_parallel_blocks_send_each_activation_once() -> None:
    """Into and out of two blocks, there and back: 8 times, as Megatron-LM.

    On auto axes 11: gradients of q, k, v and of gate, up are summed one by one there.
    """
    mesh = mesh_lib.make_mesh(1, 1, 2)
    activation = BATCH * LENGTH * CONFIG.hidden_size
    # The layers' loops are counted once. The embedding's and the output layer's
    # activations stay where they are.
    sizes = [size for _, _, size in collectives(compiled(CONFIG, mesh))]
    assert sizes.count(activation) + sizes.count(activation // 2) == 8


def test_no_gathered_kernel_is_kept_for_the_backward_pass() -> None:
    # The layers' scans hand on (L, m, n) arrays: gradients and what is kept. All of
    # them are split; one that is not would be a whole copy of the model's kernel.
    mesh = mesh_lib.make_mesh(2, 4)
    params, batch = placed(CONFIG, mesh)
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(value_and_grad(CONFIG))(params, batch).jaxpr
    kernels = {w.shape for w in jax.tree.leaves(params) if w.ndim == 3}
    handed_on = [
        var.aval
        for equation in jaxpr.eqns
        if equation.primitive.name == "scan"
        for var in equation.outvars
        if var.aval.shape in kernels
    ]
    assert len(handed_on) >= 7
    for aval in handed_on:
        assert "fsdp" in aval.sharding.spec, aval


def adapted_value_and_grad(kind: str) -> tuple[Callable[..., Any], Any, Any]:
    """Loss and gradient of a Llama with adapters, parameters, and a batch."""
    init_params, apply = functional_llama(CONFIG, Adapter(kind, 8))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda w: rng.normal(0.1, 0.3, w.shape).astype(w.dtype),
        jax.eval_shape(init_params, jax.random.key(0)),
    )
    batch = {"tokens": tokens(), "weights": np.ones((BATCH, LENGTH), np.float32)}
    loss_fn = next_token_loss(apply)
    return jax.value_and_grad(lambda p, b: loss_fn(p, b)[0]), params, batch


@functools.cache
def adapted_without_mesh(kind: str) -> Any:
    function, params, batch = adapted_value_and_grad(kind)
    return jax.device_get(jax.jit(function)(params, batch))


@pytest.mark.parametrize(
    ("kind", "explicit"), [("lora", True), ("lora", False), ("low_rank", True)]
)
def test_a_llama_with_adapters_computes_the_same_on_a_mesh(
    kind: str, explicit: bool
) -> None:
    mesh = mesh_lib.make_mesh(2, 2, 2, explicit=explicit)
    function, params, batch = adapted_value_and_grad(kind)
    shardings = mesh_lib.param_shardings(params, mesh)
    with jax.set_mesh(mesh):
        found = jax.jit(function, out_shardings=(None, shardings))(
            jax.device_put(params, shardings),
            jax.device_put(batch, mesh_lib.batch_sharding(mesh)),
        )

    def check(x: jax.Array, y: jax.Array) -> None:
        # With equality, for the gradients of frozen kernels: they are zero.
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)

    jax.tree.map(check, jax.device_get(found), adapted_without_mesh(kind))


# ----------------------------------------------------------------------- shardings


def leaf_specs(shardings: Any) -> Iterator[tuple[str, P]]:
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), sharding.spec


def test_parameters_are_split_on_the_side_that_is_not_projected() -> None:
    mesh = mesh_lib.make_mesh(2, 4)
    shardings = mesh_lib.param_shardings(abstract_params(CONFIG), mesh)
    assert dict(leaf_specs(shardings)) == {
        "embed_tokens/embedding": P("fsdp", None),
        "layers/input_norm/scale": P(None, None),
        "layers/attention/q_proj/kernel": P(None, None, "fsdp"),  # square
        "layers/attention/k_proj/kernel": P(None, "fsdp", None),  # 32 x 16
        "layers/attention/v_proj/kernel": P(None, "fsdp", None),
        "layers/attention/o_proj/kernel": P(None, None, "fsdp"),  # square
        "layers/post_attention_norm/scale": P(None, None),
        "layers/mlp/gate_proj/kernel": P(None, None, "fsdp"),  # 32 x 96
        "layers/mlp/up_proj/kernel": P(None, None, "fsdp"),
        "layers/mlp/down_proj/kernel": P(None, "fsdp", None),  # 96 x 32
        "norm/scale": P(None),
        "lm_head/kernel": P(None, "fsdp"),
    }


def test_tensor_splits_the_same_side_unless_it_works_on_the_projected_one() -> None:
    mesh = mesh_lib.make_mesh(2, 2, 2)
    shardings = mesh_lib.param_shardings(abstract_params(CONFIG), mesh)
    both = ("tensor", "fsdp")
    assert {k: P(*v[-2:]) for k, v in leaf_specs(shardings) if "scale" not in k} == {
        "embed_tokens/embedding": P(both, None),
        "layers/attention/q_proj/kernel": P(None, both),
        "layers/attention/k_proj/kernel": P("fsdp", "tensor"),  # projected: 16 of 32
        "layers/attention/v_proj/kernel": P("fsdp", "tensor"),
        "layers/attention/o_proj/kernel": P("tensor", "fsdp"),  # projected: the input
        "layers/mlp/gate_proj/kernel": P(None, both),
        "layers/mlp/up_proj/kernel": P(None, both),
        "layers/mlp/down_proj/kernel": P(both, None),
        "lm_head/kernel": P(None, both),
    }


def test_of_two_factors_tensor_cuts_the_one_that_has_the_kernels_cut_side() -> None:
    mesh = mesh_lib.make_mesh(2, 2, 2)
    init_params, _ = functional_llama(CONFIG, Adapter("lora", 8))
    abstract = jax.eval_shape(init_params, jax.random.key(0))
    shardings = mesh_lib.param_shardings(abstract, mesh)
    specs = {k: P(*v[-2:]) for k, v in leaf_specs(shardings) if "lora" in k}
    both = ("tensor", "fsdp")
    # (m, 8) and (8, n): fsdp on the larger side, tensor with it or on what it cuts.
    assert len(specs) == 14
    for path, spec in specs.items():
        assert spec == (P(both, None) if path.endswith("a") else P(None, both))
    used = {
        name: mesh_lib.RULES.used_matrix(name, shape, mesh.shape)
        for name, shape in {
            "q_proj/lora_a": (32, 8),
            "q_proj/lora_b": (8, 32),
            "o_proj/lora_a": (32, 8),
            "o_proj/lora_b": (8, 32),
        }.items()
    }
    assert used == {
        "q_proj/lora_a": P(None, None),
        "q_proj/lora_b": P(None, "tensor"),
        "o_proj/lora_a": P("tensor", None),
        "o_proj/lora_b": P(None, None),
    }


@pytest.mark.parametrize("layout", [(1, 8, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_split_over_eight_devices(
    name: str, layout: tuple[int, int, int]
) -> None:
    mesh = mesh_lib.make_mesh(*layout)
    abstract = abstract_params(PRESETS[name])
    shardings = mesh_lib.param_shardings(abstract, mesh)
    shapes = dict(
        zip(dict(leaf_specs(shardings)), jax.tree.leaves(abstract), strict=True)
    )
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        pieces = 1 if path.endswith("scale") else 8
        whole = shapes[path].shape
        part = sharding.shard_shape(whole)
        assert math.prod(whole) == pieces * math.prod(part), path


def test_the_other_side_is_split_where_the_larger_one_cannot_be() -> None:
    def split(name: str, shape: tuple[int, ...], fsdp: int, tensor: int = 1) -> P:
        sizes = {"data": 1, "fsdp": fsdp, "tensor": tensor}
        return mesh_lib.RULES.stored_matrix(name, shape, sizes)

    both = ("tensor", "fsdp")
    assert split("up_proj", (2048, 5461), 8) == P("fsdp", None)
    assert split("down_proj", (24, 5461, 2048), 8) == P(None, "fsdp")
    # tensor cannot cut the feed-forward width either: no cut, stored where it can be.
    assert split("up_proj", (2048, 5461), 4, 2) == P(both, None)
    assert split("down_proj", (24, 5461, 2048), 4, 2) == P(None, both)
    # tensor can, fsdp cannot any more.
    assert split("up_proj", (64, 86), 4, 2) == P("fsdp", "tensor")
    assert split("down_proj", (86, 64), 4, 2) == P("tensor", "fsdp")
    assert split("o_proj", (64, 70), 4, 2) == P(both, None)
    assert split("lm_head", (64, 100), 4, 2) == P("tensor", "fsdp")
    with pytest.raises(ValueError, match="30 x 45 matrix of 'lm_head': tensor=1 and "):
        split("lm_head", (30, 45), 8)


def test_a_parameter_without_a_rule_is_refused() -> None:
    params = {"mlp": {"bias": jax.ShapeDtypeStruct((8,), jnp.float32)}}
    with pytest.raises(ValueError, match="no sharding rule for parameter 'mlp/bias'"):
        mesh_lib.param_shardings(params, mesh_lib.make_mesh(1, 8))


@AXES
def test_optimizer_state_is_placed_like_the_parameters_it_comes_from(
    explicit: bool,
) -> None:
    mesh = mesh_lib.make_mesh(2, 4, explicit=explicit)
    abstract = abstract_params(CONFIG)

    def init(params: Any) -> Any:
        rows = jax.tree.map(lambda w: w.sum(-1), params)
        return optax.adam(1e-3).init(params), rows

    shardings = mesh_lib.state_shardings(init, abstract, mesh)
    expected = mesh_lib.param_shardings(abstract, mesh)
    (adam, _), rows = shardings
    assert adam.count == NamedSharding(mesh, P())
    for moment in (adam.mu, adam.nu):
        jax.tree.map(lambda m, e: m == e or pytest.fail(f"{m}, {e}"), moment, expected)
    kernels = rows["layers"]["mlp"]
    assert kernels["down_proj"]["kernel"].spec == P(None, "fsdp")
    assert kernels["up_proj"]["kernel"].spec == P(None, None)
    # And the compiled init delivers it.
    with jax.set_mesh(mesh):
        params = jax.device_put(random_params(CONFIG), expected)
        state = jax.jit(init, out_shardings=shardings)(params)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(x)),
        state,
        shardings,
    )


# ------------------------------------------------------------------------- the mesh


def test_mesh_has_named_axes_of_the_type_asked_for() -> None:
    mesh = mesh_lib.make_mesh(2, 4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert set(mesh_lib.make_mesh(explicit=False).axis_types) == {AxisType.Auto}
    batch = jax.device_put(tokens(), mesh_lib.batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(1, LENGTH + 1)}
    ranks = [device.id for device in mesh_lib.make_mesh(2, 2, 2).devices.flat]
    assert ranks == sorted(ranks)  # tensor is innermost: neighbours


def test_impossible_meshes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got data=0 x fsdp=2 x tensor=1"):
        mesh_lib.make_mesh(0, 2)
    devices = jax.device_count()
    with pytest.raises(ValueError, match=f"needs {2 * devices} devices, but JAX sees"):
        mesh_lib.make_mesh(2, devices)
