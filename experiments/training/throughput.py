"""Tokens a second, and the share of the chips' peak that the model makes of it."""

import dataclasses
from typing import Self

import jax

from experiments.models.llama_config import LlamaConfig
from experiments.models.lora import Adapter
from experiments.training.chips import known_chip


def flops_per_token(
    config: LlamaConfig, sequence_length: int, adapter: Adapter | None = None
) -> int:
    """Counts the operations that training on one token takes.

    A multiply-add counts as two. Forward: every weight of a matrix product once, and
    attention's two products with all `sequence_length` positions; backward: twice
    that. Together `6 N + 12 L D T`, as PaLM's appendix B (arXiv 2204.02311) counts:
    what the causal mask hides is counted, the embedding's look-up, norms, softmax,
    recomputation and the optimizer are not. An adapter's factors count as weights; a
    frozen kernel, which needs no gradient of its own, counts 4 a weight instead of 6.

    Args:
        config: Shape of the model.
        sequence_length: Tokens of context, T.
        adapter: Of the layers' projections, None without.

    Returns:
        Operations a token, forward and backward.

    Example:
        >>> from experiments.models.llama_config import PRESETS
        >>> f"{flops_per_token(PRESETS['llama_7b'], 2048):.3g}"
        '4.29e+10'
    """
    d, kv = config.hidden_size, config.kv_heads * config.head_size
    f = config.intermediate_size
    sides = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    layer = sum(_of_matrix(m, n, adapter) for m, n in sides) + 12 * d * sequence_length
    return config.num_layers * layer + 6 * d * config.vocab_size


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What a step's tokens and seconds say about speed.

    Attributes:
        flops_per_token: Operations that training on a token takes.
        peak_flops: Operations a second of all devices together at their peak; None
            where the chip is unknown, as a CPU is.
    """

    flops_per_token: int
    peak_flops: float | None

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        sequence_length: int,
        devices: int,
        adapter: Adapter | None = None,
    ) -> Self:
        """Makes the one of a model on this many of the devices that JAX sees."""
        chip = known_chip(jax.devices()[0].device_kind)
        peak = None if chip is None else devices * chip.peak_flops
        return cls(flops_per_token(config, sequence_length, adapter), peak)

    def __call__(self, tokens: float, seconds: float) -> dict[str, float]:
        """Returns what to add to a step's row of metrics.

        Args:
            tokens: Tokens learnt from; padding is none.
            seconds: Time of the step.

        Returns:
            `tokens_per_second` of all devices together and, where the peak is known,
            `mfu`: model FLOPs utilisation, 0 to 1.
        """
        rate = tokens / seconds
        row = {"tokens_per_second": rate}
        if self.peak_flops is not None:
            row["mfu"] = rate * self.flops_per_token / self.peak_flops
        return row


def _of_matrix(m: int, n: int, adapter: Adapter | None) -> int:
    if adapter is None:
        return 6 * m * n
    factors = 6 * adapter.rank * (m + n)
    return factors + 4 * m * n if adapter.kind == "lora" else factors
