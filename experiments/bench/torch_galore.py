"""The published GaLore, in PyTorch, where it is installed: `galore-torch`.

Its step also adds the update to the parameters, which the others' does not; a few per
cent of its time.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench.optimizers import check_installed

NOTE = "adds the update to the parameters as well"


class TorchUpdates:
    """Steps of `galore_torch.GaLoreAdamW` on the same matrices.

    Has the methods of `programs.Updates` that timing needs.
    """

    def __init__(
        self, gradients: Any, *, rank: int, gap: int, scale: float, rate: float
    ) -> None:
        """Copies the gradients; the first step makes the state.

        Args:
            gradients: Float32 leaves of two dimensions.
            rank: Directions of each subspace.
            gap: Steps between refreshes.
            scale: Factor on the updates.
            rate: Learning rate.

        Raises:
            NotInstalledError: PyTorch or galore-torch is not here.
        """
        check_installed("torch_galore")
        self._torch = importlib.import_module("torch")
        galore = importlib.import_module("galore_torch")
        self._gap = gap
        self._device = "cuda" if self._torch.cuda.is_available() else "cpu"
        self._params = [self._parameter(leaf) for leaf in jax.tree.leaves(gradients)]
        group = {"params": self._params, "rank": rank, "update_proj_gap": gap}
        group |= {"scale": scale, "proj_type": "std"}
        self._optimizer = galore.GaLoreAdamW([group], lr=rate)

    def run(self, calls: int, *, refresh: bool) -> None:
        """Does steady updates or refreshes, and waits for the last."""
        for _ in range(calls):
            for state in self._states():
                state["step"] = self._gap + (0 if refresh else 1)
            self._optimizer.step()
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def _states(self) -> Sequence[dict[str, Any]]:
        return [self._optimizer.state[param] for param in self._params]

    def _parameter(self, gradient: jax.Array) -> Any:
        values = self._torch.tensor(np.asarray(gradient), device=self._device)
        parameter = self._torch.nn.Parameter(self._torch.zeros_like(values))
        parameter.grad = values
        return parameter
