"""Checkpoints that cannot be read say which file or tensor, and why."""

import json

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from experiments.models import huggingface
from experiments.models.encoder import functional_encoder
from experiments.models.encoder_checkpoint import (
    Labels,
    load_encoder,
    read_encoder_config,
    save_encoder,
)
from experiments.models.huggingface import CheckpointError
from tests.experiments import small_encoder

QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def folder(tmp_path):
    return small_encoder.write_encoder(tmp_path / "model", "bert")


def load(folder, classes=3):
    config = read_encoder_config(folder)
    init_params, _ = functional_encoder(config, classes)
    return load_encoder(folder, config, init_params(jax.random.key(0)))


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_weights_that_cannot_be_written_are_named_and_the_old_ones_stay(
    folder, monkeypatch
):
    def full(tensors, path, metadata):
        path.write_text("half")
        raise SafetensorError("Error while serializing: No space left on device")

    params, config = load(folder), read_encoder_config(folder)
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(OSError, match=r"safetensors cannot be written .*No space"):
        save_encoder(folder, config, params, Labels("rte", ("yes", "no")))
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_a_missing_tensor_names_itself(folder):
    edit(folder, lambda tensors: tensors.pop(QUERY))
    with pytest.raises(CheckpointError, match=f"no tensor '{QUERY}', .*q_proj/kernel"):
        load(folder)


def test_a_misshapen_tensor_names_itself(folder):
    edit(folder, lambda tensors: tensors.update({QUERY: np.zeros((4, 16), np.float32)}))
    with pytest.raises(CheckpointError, match=f"'{QUERY}' .* is .4, 16., .*.16, 16."):
        load(folder)


def test_a_head_of_other_classes_is_not_taken_for_ours(folder):
    with pytest.raises(CheckpointError, match=r"'classifier.weight' .*\(3, 16\)"):
        load(folder, classes=2)


def test_damaged_weights_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(folder)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        load(folder)


def test_shards_are_found_by_their_index(folder):
    expected = load(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)
    save_file({names[0]: tensors[names[0]]}, folder / "a.safetensors")
    with pytest.raises(CheckpointError, match="which its index has"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json is no index of shards"):
        load(folder)


def test_old_names_of_norms_are_known(folder):
    expected = load(folder)

    def rename(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace("Norm.weight", "Norm.gamma").replace(
                "Norm.bias", "Norm.beta"
            )
            tensors[old] = tensors.pop(name)

    edit(folder, rename)
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)


def test_a_folder_without_config_says_what_it_needs(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        read_encoder_config(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_encoder_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_encoder_config(folder)
