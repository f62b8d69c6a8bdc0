"""Memory and peak speed of known chips, by the name that JAX gives a device."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device is, by its maker's data sheet.

    Attributes:
        name: Short name.
        peak_flops: Dense bfloat16 multiply-adds a second, counted as two operations.
        memory: Bytes of its high-bandwidth memory.
    """

    name: str
    peak_flops: float
    memory: int


_GB = 10**9
_GIB = 2**30

# The longest prefix of `device_kind` decides. TPU v2, v3 and v7x chips are two JAX
# devices each, so a device is half of the data sheet's chip. Sources: cloud.google.com
# /tpu/docs (system architecture of each version); NVIDIA's data sheets, whose figures
# "with sparsity" are halved.
_CHIPS = {
    "TPU v2": Chip("v2 core", 22.5e12, 8 * _GIB),
    "TPU v3": Chip("v3 core", 61.5e12, 16 * _GIB),
    "TPU v4": Chip("v4", 275e12, 32 * _GIB),
    "TPU v4 lite": Chip("v4i", 138e12, 8 * _GIB),
    "TPU v5": Chip("v5p", 459e12, 95 * _GIB),
    "TPU v5p": Chip("v5p", 459e12, 95 * _GIB),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * _GIB),
    "TPU v5e": Chip("v5e", 197e12, 16 * _GIB),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * _GIB),
    "TPU v6e": Chip("v6e", 918e12, 32 * _GIB),
    "TPU7x": Chip("v7x core", 1153.5e12, 96 * _GIB),
    "NVIDIA L4": Chip("L4", 121e12, 24 * _GB),
    "NVIDIA A100": Chip("A100", 312e12, 40 * _GB),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80 * _GB),
    "NVIDIA A100 80GB": Chip("A100", 312e12, 80 * _GB),
    "NVIDIA H100": Chip("H100", 989e12, 80 * _GB),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12, 94 * _GB),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80 * _GB),
    "NVIDIA GH200": Chip("GH200", 989e12, 96 * _GB),
    "NVIDIA H200": Chip("H200", 989e12, 141 * _GB),
    "NVIDIA H200 NVL": Chip("H200 NVL", 835e12, 141 * _GB),
    "NVIDIA B200": Chip("B200", 2250e12, 180 * _GB),
}


def known_chip(device_kind: str) -> Chip | None:
    """Returns the chip that a JAX device of this kind is; None if it is unknown.

    Example:
        >>> known_chip("TPU v5 lite").name, known_chip("cpu")
        ('v5e', None)
        >>> known_chip("NVIDIA H100 80GB HBM3").name, known_chip("NVIDIA L40S")
        ('H100', None)
    """
    # The name ends there or goes on with another word: an L40 is no L4.
    prefixes = [
        prefix
        for prefix in _CHIPS
        if device_kind.startswith(prefix)
        and not device_kind[len(prefix) : len(prefix) + 1].isalnum()
    ]
    return _CHIPS[max(prefixes, key=len)] if prefixes else None
