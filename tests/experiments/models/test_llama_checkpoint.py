"""A Llama in transformers' layout, written and read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.models import huggingface, lora
from experiments.models.functional import functional_llama
from experiments.models.huggingface import CheckpointError
from experiments.models.llama_checkpoint import (
    load_llama,
    read_llama_config,
    save_llama,
)
from experiments.training import distributed
from experiments.training.mesh import make_mesh, param_shardings
from tests.experiments.small_llama import CONFIG

SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    "model.norm.weight": (32,),
    "lm_head.weight": (64, 32),
}
for LAYER in range(2):
    AT = f"model.layers.{LAYER}"
    SHAPES |= {
        f"{AT}.input_layernorm.weight": (32,),
        f"{AT}.post_attention_layernorm.weight": (32,),
        f"{AT}.self_attn.q_proj.weight": (32, 32),
        f"{AT}.self_attn.k_proj.weight": (16, 32),
        f"{AT}.self_attn.v_proj.weight": (16, 32),
        f"{AT}.self_attn.o_proj.weight": (32, 32),
        f"{AT}.mlp.gate_proj.weight": (96, 32),
        f"{AT}.mlp.up_proj.weight": (96, 32),
        f"{AT}.mlp.down_proj.weight": (32, 96),
    }


def make(config, adapter=None):
    init_params, _ = functional_llama(config, adapter)
    return jax.jit(init_params)(jax.random.key(0))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(
            CONFIG, tie_embeddings=True, rope_theta=500.0, rope_factor=4.0
        ),
        dataclasses.replace(CONFIG, num_kv_heads=None, param_dtype="bfloat16"),
    ],
    ids=["grouped", "tied", "bfloat16"],
)
def test_what_is_written_is_read_again(config, tmp_path):
    params = make(config)
    save_llama(tmp_path, config, params, {"eos_token_id": 7})
    found = read_llama_config(tmp_path)
    kept = dataclasses.replace(
        config, num_kv_heads=config.kv_heads, param_dtype="float32"
    )
    assert found == kept
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7
    again = load_llama(tmp_path, config, jax.tree.map(jnp.zeros_like, params))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_names_and_layouts_are_those_of_transformers(tmp_path):
    params = make(CONFIG)
    save_llama(tmp_path, CONFIG, params)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == SHAPES
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.k_proj.weight"],
        np.asarray(params["layers"]["attention"]["k_proj"]["kernel"][1]).T,
    )
    np.testing.assert_array_equal(
        tensors["model.embed_tokens.weight"], params["embed_tokens"]["embedding"]
    )


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "auto"])
@pytest.mark.parametrize("adapter", [None, lora.Adapter("lora", 4)])
def test_a_split_model_is_saved_without_a_whole_one_on_devices(
    adapter, explicit, tmp_path, monkeypatch
):
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    whole = jax.tree.map(
        lambda x: x + jnp.asarray(0.01, x.dtype), make(config, adapter)
    )
    mesh = make_mesh(fsdp=4, tensor=2, explicit=explicit)
    split = jax.device_put(whole, param_shardings(whole, mesh))
    save_file = huggingface.save_file

    def on_devices():
        """Arrays of several: what NumPy reads of them are their parts, not copies."""
        return {id(x) for x in jax.live_arrays() if len(x.sharding.device_set) > 1}

    before = on_devices()

    def look(tensors, path, metadata):
        assert {type(tensor) for tensor in tensors.values()} == {np.ndarray}
        assert on_devices() <= before
        save_file(tensors, path, metadata)

    def fetch(x):
        assert len(on_devices() - before) <= 1  # the kernel that is merged
        return distributed.fetch(x)

    def save(name, params):
        merged = lora.without_adapter(params, adapter, fetch)
        save_llama(tmp_path / name, config, merged)
        return load_file(tmp_path / name / "model.safetensors")

    monkeypatch.setattr(huggingface, "save_file", look)
    with jax.set_mesh(mesh):
        found = save("split", split)
    expected = save("whole", whole)
    assert {x.dtype for x in found.values()} == {jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', only 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"rope_scaling": {"rope_type": "llama3"}},
            "scaling 'llama3' is not supported",
        ),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"num_attention_heads": 3}, "hidden_size=32 must be a multiple"),
        ({"hidden_size": None}, "NoneType|hidden_size"),
    ],
)
def test_models_that_differ_are_refused(change, message, tmp_path):
    save_llama(tmp_path, CONFIG, make(CONFIG))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"config.json: .*({message})"):
        read_llama_config(tmp_path)


def test_both_places_of_rotary_settings_are_read(tmp_path):
    """Older: a field and a scaling; transformers 5: one object."""
    save_llama(tmp_path, CONFIG, make(CONFIG))
    path = tmp_path / "config.json"
    facts = json.loads(path.read_text())
    del facts["rope_theta"], facts["rope_scaling"]
    old = {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}
    for more in (old, {"rope_parameters": new}):
        path.write_text(json.dumps(facts | more))
        found = read_llama_config(tmp_path)
        assert (found.rope_theta, found.rope_factor) == (9.0, 2.0)


def test_a_field_that_is_missing_is_named(tmp_path):
    save_llama(tmp_path, CONFIG, make(CONFIG))
    path = tmp_path / "config.json"
    facts = json.loads(path.read_text())
    del facts["vocab_size"]
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="vocab_size"):
        read_llama_config(tmp_path)
