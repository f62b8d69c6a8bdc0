"""JSON objects that know whether they have been damaged."""

import json
import zlib
from collections.abc import Mapping
from typing import Any


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object of `content` and its checksum.

    Raises:
        TypeError: Something in `content` is not JSON.
        ValueError: A number in it is not finite.
    """
    return {"content": content, "checksum": _checksum(content)}


def unseal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a sealed object.

    Raises:
        KeyError: It was not sealed.
        ValueError: It is not what was sealed.
    """
    if _checksum(record["content"]) != record["checksum"]:
        raise ValueError("the checksum of its record is wrong")
    return record["content"]


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a phrase on every entry in which two JSON objects differ."""
    old, new = _flatten(before), _flatten(now)
    return [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def first_line(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its message, shortened."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # TensorStore's: what went wrong stands at the end, but for places in its source.
    text = f"{type(error).__name__}: {lines[0].partition(' [source locations=')[0]}"
    return text if len(text) <= 320 else f"{text[:160]} … {text[-160:]}"


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
