"""Which device holds what of parameters and optimizer state, and the mesh itself."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.models.functional import functional_llama
from experiments.models.llama import PRESETS
from experiments.models.lora import Adapter
from experiments.training import mesh as mesh_lib
from experiments.training.state import init_program
from tests.experiments.small_llama import CONFIG, abstract_params


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
    params = {"mlp": {"offset": jax.ShapeDtypeStruct((8,), jnp.float32)}}
    with pytest.raises(ValueError, match="no sharding rule for parameter 'mlp/offset'"):
        mesh_lib.param_shardings(params, mesh_lib.make_mesh(1, 8))


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "auto"])
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
        params = jax.tree.map(lambda w: np.ones(w.shape, w.dtype), abstract)
        params = jax.device_put(params, expected)
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
    batch = jax.device_put(np.zeros((8, 21)), mesh_lib.batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(1, 21)}
    ranks = [device.id for device in mesh_lib.make_mesh(2, 2, 2).devices.flat]
    assert ranks == sorted(ranks)  # tensor is innermost: neighbours


def chips(shape: tuple[int, ...], kind: str) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            platform="tpu", device_kind=kind, id=id, coords=coords, core_on_chip=0
        )
        for id, coords in enumerate(np.ndindex(shape))
    ]


@pytest.mark.parametrize(
    ("kind", "shape", "sizes"),
    [
        ("TPU v6 lite", (8, 8, 1), (4, 16, 1)),
        ("TPU v6 lite", (8, 8, 1), (2, 16, 2)),
        ("TPU v5", (4, 4, 4), (2, 32, 1)),
        ("TPU v5", (4, 4, 4), (8, 8, 1)),
        ("TPU v5 lite", (4, 8, 1), (2, 4, 4)),
    ],
)
def test_axes_need_not_be_those_of_the_torus(kind, shape, sizes) -> None:
    arranged = mesh_lib.arrange(sizes, chips(shape, kind))
    assert arranged.shape == sizes
    assert {chip.id for chip in arranged.flat} == set(range(math.prod(sizes)))


@pytest.mark.parametrize(
    ("sizes", "lanes"),
    [
        ((4, 8, 1), [[0], [1], [2], [3]]),  # a copy of the weights a node
        ((2, 16, 1), [[0, 1], [2, 3]]),
        ((1, 4, 8), [[0, 1, 2, 3]]),
        ((8, 2, 2), [[0], [0], [1], [1], [2], [2], [3], [3]]),
    ],
)
def test_nodes_of_gpus_are_kept_together(sizes, lanes) -> None:
    gpus = [
        SimpleNamespace(platform="gpu", device_kind="H100", id=i, slice_index=i // 8)
        for i in range(32)
    ]
    arranged = mesh_lib.arrange(sizes, gpus)
    assert arranged.shape == sizes
    nodes = [sorted({gpu.slice_index for gpu in copy.flat}) for copy in arranged]
    assert nodes == lanes
    tensor = arranged.reshape(-1, sizes[-1])
    assert all(len({gpu.slice_index for gpu in row}) == 1 for row in tensor)


@pytest.mark.parametrize("explicit", [True, False])
def test_each_device_makes_its_part_of_the_parameters(explicit) -> None:
    init_params, _ = functional_llama(PRESETS["demo"])
    mesh = mesh_lib.make_mesh(1, 8, explicit=explicit)
    key = jax.random.key(0)
    shardings = mesh_lib.param_shardings(jax.eval_shape(init_params, key), mesh)
    with jax.set_mesh(mesh):
        program = init_program(init_params, shardings).lower(key).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * memory.output_size_in_bytes


def test_impossible_meshes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got data=0 x fsdp=2 x tensor=1"):
        mesh_lib.make_mesh(0, 2)
    devices = jax.device_count()
    with pytest.raises(ValueError, match=f"needs {2 * devices} devices, but JAX sees"):
        mesh_lib.make_mesh(2, devices)
