"""Weights in the layout of transformers: safetensors in a folder, in and out.

A table says which tensor of a checkpoint is which parameter. Linear layers are
transposed there, and their layers are not stacked.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from experiments.files import replace_text

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; says which file or tensor, and why."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter and its tensor.

    Attributes:
      path: Of the parameter, names joined by slashes.
      tensor: Name in the checkpoint; ``{layer}`` in it stands for the number of a
        layer, over which the parameter is stacked.
      optional: Whether a checkpoint may lack it; the parameter then keeps the value
        that the model was made with.
    """

    path: str
    tensor: str
    optional: bool = False

    @property
    def transposed(self) -> bool:
        """Whether the tensor is the parameter's transpose."""
        return self.path.endswith("/kernel")

    def tensors(self, shape: tuple[int, ...]) -> list[str]:
        """Names of the tensors of a parameter of this shape."""
        if "{layer}" not in self.tensor:
            return [self.tensor]
        return [self.tensor.format(layer=layer) for layer in range(shape[0])]


Table = Sequence[Entry]


def read_config(folder: Path) -> dict[str, Any]:
    """Returns what a folder's config.json says.

    Raises:
      CheckpointError: There is none, or it is no JSON object.
    """
    path = folder / CONFIG
    try:
        facts = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {CONFIG}: give a folder in the layout of transformers, "
            f"with {CONFIG}, {WEIGHTS} and the tokenizer."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return facts


def sha256(files: Iterable[Path]) -> str:
    """Returns the SHA-256 of files' contents, one after another, in hex."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """Returns a SHA-256 of a folder's config and weights, in hex."""
    return sha256([folder / CONFIG, *sorted(folder.glob("*.safetensors"))])


def tensor_names(folder: Path) -> set[str]:
    """Returns the names of the tensors of a checkpoint; raises as `load` does."""
    return set(_files(folder))


def load(folder: Path, table: Table, params: optax.Params) -> optax.Params:
    """Returns `params` with the values of a checkpoint.

    Args:
      folder: With model.safetensors, or its shards and their index.
      table: Where each parameter is found. A parameter that is not in it keeps its
        value; a tensor that is not is left alone.
      params: Nested dictionaries of arrays, as the model was made; they give shapes,
        dtypes and shardings.

    Raises:
      CheckpointError: A file is missing or damaged, a tensor missing or misshapen.
    """
    files = _files(folder)
    flat = traverse_util.flatten_dict(params, sep="/")
    for entry in table:
        like = flat[entry.path]
        names = entry.tensors(like.shape)
        found = [name in files for name in names]
        if entry.optional and not any(found):
            continue
        if not all(found):
            missing = names[found.index(False)]
            raise CheckpointError(
                f"{folder} has no tensor {missing!r}, which {entry.path} is read from."
            )
        stacked = "{layer}" in entry.tensor
        shape = like.shape[1:] if stacked else like.shape
        shape = shape[::-1] if entry.transposed else shape
        layers = [_read(files[name], name, shape) for name in names]
        layers = [x.T if entry.transposed else x for x in layers]
        whole = np.stack(layers) if stacked else layers[0]
        flat[entry.path] = jax.device_put(whole.astype(like.dtype), like.sharding)
    return traverse_util.unflatten_dict(flat, sep="/")


def save(
    folder: Path, table: Table, params: optax.Params, config: Mapping[str, Any]
) -> None:
    """Writes parameters and config.json into a folder, which is made.

    Args:
      folder: Where to.
      table: Where each parameter goes.
      params: Nested dictionaries of arrays, which all this process has; they stay on
        the host.
      config: What config.json says.

    Raises:
      OSError: They cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    for entry in table:
        if entry.path not in flat:
            continue
        whole = flat[entry.path]
        layers = whole if "{layer}" in entry.tensor else [whole]
        for name, layer in zip(entry.tensors(whole.shape), layers, strict=True):
            turned = layer.T if entry.transposed else layer
            tensors[name] = np.ascontiguousarray(turned)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{WEIGHTS}.tmp"
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    except SafetensorError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{folder / WEIGHTS} cannot be written ({error}).") from error
    unfinished.replace(folder / WEIGHTS)
    replace_text(folder / CONFIG, json.dumps(dict(config), indent=2) + "\n")


def _files(folder: Path) -> dict[str, Path]:
    """The file that each tensor is in."""
    index = folder / _INDEX
    if index.exists():
        try:
            names = json.loads(index.read_text("utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{index} is no index of shards ({error!r})."
            ) from error
        return {tensor: folder / name for tensor, name in names.items()}
    path = folder / WEIGHTS
    if not path.exists():
        others = sorted(folder.glob("*.bin")) if folder.is_dir() else []
        why = f" ({others[0].name} is a pickle, which is not read)" if others else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS}{why}.")
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path)


def _read(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    with _open(path) as file:
        if name not in file.keys():
            raise CheckpointError(f"{path} lacks tensor {name!r}, which its index has.")
        found = tuple(file.get_slice(name).get_shape())
        if found != shape:
            raise CheckpointError(
                f"tensor {name!r} of {path} is {found}, the model needs {shape}."
            )
        return np.asarray(file.get_tensor(name))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="flax")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
