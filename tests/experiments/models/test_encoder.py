"""The encoder computes what transformers does, and does so on any mesh."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.encoder import dropout, functional_encoder
from experiments.models.encoder_checkpoint import (
    Labels,
    load_encoder,
    read_encoder_config,
    save_encoder,
)
from experiments.models.encoder_config import EncoderConfig
from experiments.models.lora import Adapter
from experiments.training import mesh as mesh_lib
from tests.experiments import small_encoder

LENGTHS = np.array([9, 4, 12, 7, 5, 12, 2, 10], np.int32)
FAMILIES = pytest.mark.parametrize("family", ["bert", "roberta"])
MNLI = Labels("mnli", ("entailment", "neutral", "contradiction"))
_WIDTH = 12


def inputs(config: EncoderConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (len(LENGTHS), _WIDTH)
    tokens = rng.integers(4, config.vocab_size, shape).astype(np.int32)
    seen = np.arange(_WIDTH) < LENGTHS[:, None]
    types = (np.arange(_WIDTH) > 3) * seen * (config.token_types - 1)
    tokens = np.where(seen, tokens, config.pad_token).astype(np.int32)
    return {"tokens": tokens, "lengths": LENGTHS, "types": types.astype(np.int32)}


def load(folder: Path, classes: int = 3, seed: int = 0) -> tuple[EncoderConfig, Any]:
    config = read_encoder_config(folder)
    init_params, _ = functional_encoder(config, classes)
    params = jax.jit(init_params)(jax.random.key(seed))
    return config, load_encoder(folder, config, params)


def scores(config: EncoderConfig, params: Any, key: jax.Array | None = None) -> Any:
    _, apply = functional_encoder(config, params["head"]["out_proj"]["bias"].size)
    return jax.jit(apply)(params, *inputs(config).values(), key)


@FAMILIES
def test_scores_are_those_of_the_formulas(family, tmp_path):
    """Each sequence by itself and without padding, in float64."""
    folder = small_encoder.write_encoder(tmp_path, family)
    config, params = load(folder)
    batch, found = inputs(config), scores(config, params)
    for row, length in enumerate(LENGTHS):
        expected = small_encoder.scores(
            folder, batch["tokens"][row, :length], batch["types"][row, :length]
        )
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


@FAMILIES
def test_a_checkpoint_of_the_encoder_alone_leaves_the_head_new(family, tmp_path):
    folder = small_encoder.write_encoder(tmp_path, family, classes=None)
    tensors = small_encoder.random_tensors(family, None)
    config, params = load(folder, classes=5)
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["up_proj"]["kernel"][1],
        tensors["encoder.layer.1.intermediate.dense.weight"].T,
    )
    assert params["head"]["out_proj"]["kernel"].shape == (small_encoder.WIDTH, 5)
    dense = params["head"]["dense"]["kernel"]
    if family == "bert":  # BERT's pooler, which is pretrained
        np.testing.assert_array_equal(dense, tensors["pooler.dense.weight"].T)
    else:
        init_params, _ = functional_encoder(config, 5)
        new = jax.jit(init_params)(jax.random.key(0))["head"]["dense"]["kernel"]
        np.testing.assert_array_equal(dense, new)


@FAMILIES
def test_what_is_saved_is_loaded_again(family, tmp_path):
    config, params = load(small_encoder.write_encoder(tmp_path / "there", family))
    save_encoder(tmp_path / "here", config, params, MNLI)
    again, loaded = load(tmp_path / "here", seed=1)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    ("wanted", "same"),
    [
        (MNLI, True),
        (Labels("rte", ("entailment", "not_entailment")), False),
        (Labels("cola", ("0", "1", "2")), False),
        (Labels("mnli", MNLI.names[::-1]), False),
    ],
    ids=["same", "fewer", "other", "reversed"],
)
@FAMILIES
def test_the_head_of_another_task_is_left_out(family, wanted, same, tmp_path):
    config, saved = load(small_encoder.write_encoder(tmp_path / "there", family))
    save_encoder(tmp_path / "here", config, saved, MNLI)
    init_params, _ = functional_encoder(config, len(wanted.names))
    new, said = jax.jit(init_params)(jax.random.key(1)), []
    params = load_encoder(tmp_path / "here", config, new, wanted, said.append)
    head = saved["head"] if same else new["head"]
    if family == "bert":
        head = head | {"dense": saved["head"]["dense"]}
    jax.tree.map(np.testing.assert_array_equal, params, saved | {"head": head})
    assert len(said) == (not same)
    assert same or f"is of {wanted.task} (finetuning_task, id2label)" in said[0]


def test_a_head_that_says_nothing_is_no_task_s_and_none_is_not_missed(tmp_path):
    said = []
    for classes in (3, None):
        folder = small_encoder.write_encoder(tmp_path / str(classes), "bert", classes)
        config = read_encoder_config(folder)
        init_params, _ = functional_encoder(config, 3)
        new = jax.jit(init_params)(jax.random.key(1))
        params = load_encoder(folder, config, new, MNLI, said.append)
        jax.tree.map(
            np.testing.assert_array_equal,
            params["head"]["out_proj"],
            new["head"]["out_proj"],
        )
    assert len(said) == 1 and str(tmp_path / "3" / "config.json") in said[0]


def test_dropout_is_drawn_by_its_key(tmp_path):
    config, params = load(small_encoder.write_encoder(tmp_path, "roberta"))
    one, same, other, none = (
        np.asarray(scores(config, params, key))
        for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2), None)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    assert np.abs(one - none).max() > 0.01
    off = dataclasses.replace(config, dropout=0.0)
    np.testing.assert_array_equal(scores(off, params, jax.random.key(1)), none)


def test_dropout_keeps_the_mean():
    x = dropout(jnp.ones((400, 500)), 0.2, jax.random.key(0))
    values, counts = np.unique(x, return_counts=True)
    np.testing.assert_allclose(values, [0, 1.25])
    assert counts[0] / x.size == pytest.approx(0.2, abs=0.005)


def test_lora_starts_as_the_encoder_alone(tmp_path):
    folder = small_encoder.write_encoder(tmp_path, "bert")
    config, params = load(folder)
    init_params, apply = functional_encoder(config, 3, Adapter("lora", 2))
    adapted = load_encoder(folder, config, jax.jit(init_params)(jax.random.key(0)))
    assert "lora_a" in adapted["layers"]["attention"]["q_proj"]
    found = jax.jit(apply)(adapted, *inputs(config).values(), None)
    np.testing.assert_array_equal(found, scores(config, params))


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "auto"])
@FAMILIES
def test_an_encoder_computes_the_same_on_a_mesh(family, explicit, tmp_path):
    """Scores and gradients, dropout included, on 2 x 2 x 2 devices and on one."""
    config, params = load(
        small_encoder.write_encoder(tmp_path, family, classes=2), classes=2
    )
    config = dataclasses.replace(config, remat="layer")
    _, apply = functional_encoder(config, 2)

    def loss(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        key = jax.random.key(3)
        found = apply(params, batch["tokens"], batch["lengths"], batch["types"], key)
        return jnp.sum(jnp.sin(found)), found

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(value_and_grad)(params, inputs(config))
    mesh = mesh_lib.make_mesh(2, 2, 2, explicit=explicit)
    shardings = mesh_lib.param_shardings(params, mesh)
    placed = jax.device_put(params, shardings)
    batch = jax.device_put(inputs(config), mesh_lib.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(value_and_grad)(placed, batch)

    def check(x: jax.Array, y: jax.Array) -> None:
        error = np.linalg.norm(np.asarray(x) - np.asarray(y))
        assert error <= 1e-4 * max(np.linalg.norm(y), 1e-2)

    jax.tree.map(check, found, expected)
    for x, sharding in zip(*map(jax.tree.leaves, (found[1], shardings)), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_sequences_longer_than_the_positions_are_refused(tmp_path):
    config, params = load(small_encoder.write_encoder(tmp_path, "roberta"))
    _, apply = functional_encoder(config, 3)
    long = jnp.zeros((1, 39), jnp.int32)
    with pytest.raises(ValueError, match=r"of 39 tokens are longer than .* 38 pos"):
        apply(params, long, jnp.array([39]), long, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not among bert, roberta"),
        ({"hidden_act": "silu"}, "activation must be one of gelu"),
        ({"num_attention_heads": 5}, "must be a multiple of num_heads=5"),
        ({"position_embedding_type": "relative_key"}, "is not absolute"),
    ],
)
def test_a_config_that_is_none_of_an_encoder_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig.from_hugging_face(small_encoder.facts("bert") | change)
    facts = small_encoder.facts("bert")
    del facts["vocab_size"]
    with pytest.raises(ValueError, match="it has no vocab_size"):
        EncoderConfig.from_hugging_face(facts)
