"""Natural GaLore in NumPy float64, from the papers, one matrix at a time.

Nothing here is shared with the library and nothing is clever: dense ``k x k``
Fisher matrices, ``np.linalg.svd``, Python loops, lists that grow and are cut. A
matrix keeps its own orientation, so "left" and "right" are written out twice where
the library transposes. Sections are those of the algorithm's description:
1 GaLore (arXiv 2403.03507), 2 the natural gradient (arXiv 2410.16029), 7 the
gradient outside the subspace (arXiv 2502.07752, 2410.01623).
"""

from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray


def dense_natural_gradient(
    columns: Sequence[Array], gradient: Array, damping: float
) -> Array:
    """``(lambda I + H H^T)^{-1} g`` by a dense ``k x k`` solve in float64."""
    h = np.stack([np.asarray(c, np.float64).ravel() for c in columns], axis=1)
    g = np.asarray(gradient, np.float64).ravel()
    fisher = damping * np.eye(g.size) + h @ h.T
    return np.linalg.solve(fisher, g).reshape(np.shape(gradient))


def woodbury_natural_gradient(
    columns: Sequence[Array], gradient: Array, damping: float, dtype: type = np.float64
) -> Array:
    """The paper's Eq. 12 in ``dtype``: ``g/l - H (l I + H^T H)^{-1} H^T g / l``."""
    h = np.stack([np.asarray(c, dtype).ravel() for c in columns], axis=1)
    g = np.asarray(gradient, dtype).ravel()
    damping = dtype(damping)
    gram = damping * np.eye(h.shape[1], dtype=dtype) + h.T @ h
    correction = h @ np.linalg.solve(gram, h.T @ g)
    return ((g - correction) / damping).reshape(np.shape(gradient))


class Natural:
    """Section 2: a window of the last ``history`` gradients and the dense solve."""

    def __init__(self, history: int, damping: float, relative: bool = False):
        self.history, self.damping, self.relative = history, damping, relative
        self.columns: list[Array] = []

    def __call__(self, gradient: Array) -> Array:
        self.columns = [*self.columns, gradient][-self.history :]
        damping = self.damping
        if self.relative:  # to the mean of the non-zero diagonal of the Gram matrix
            energies = [np.sum(c**2) for c in self.columns]
            damping *= np.sum(energies) / max(np.count_nonzero(energies), 1)
        if not damping > 0:  # relative to nothing: all gradients were zero
            return np.zeros_like(gradient)
        return dense_natural_gradient(self.columns, gradient, damping)

    def move(self, rotate: Callable[[Array], Array], policy: str) -> None:
        if policy == "rotate":
            self.columns = [rotate(c) for c in self.columns]
        elif policy == "reset":
            self.columns = []


class Adam:
    """Adam with bias correction and eps outside the root."""

    def __init__(self, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.m: Array | float = 0.0
        self.v: Array | float = 0.0
        self.t = 0

    def __call__(self, g: Array) -> Array:
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m = self.m / (1 - self.b1**self.t)
        v = self.v / (1 - self.b2**self.t)
        return m / (np.sqrt(v) + self.eps)

    def move(
        self,
        rotate: Callable[[Array], Array],
        rotate_squares: Callable[[Array], Array],
        policy: str,
    ) -> None:
        if self.t and policy == "rotate":
            self.m, self.v = rotate(self.m), rotate_squares(self.v)
        elif policy == "reset":
            self.m, self.v, self.t = 0.0, 0.0, 0


class Compensation:
    """Section 7 for a matrix whose rows are projected: weights by column."""

    def __init__(self, weight: float, decay: float = 0.999, max_growth: float = 1.01):
        self.weight, self.decay, self.max_growth = weight, decay, max_growth
        self.p: Array | float = 0.0
        self.norm: float | None = None
        self.t = 0

    def __call__(self, g: Array, p_r: Array, r: Array, codimension: int) -> Array:
        self.t += 1
        outside = np.sum(g**2, axis=0) - np.sum(r**2, axis=0)
        self.p = self.decay * self.p + (1 - self.decay) * outside
        p = self.p / (1 - self.decay**self.t)
        added = np.sqrt(codimension) * (g - p_r) / np.sqrt(p)
        norm = np.linalg.norm(added)
        limited = norm if self.norm is None else min(norm, self.max_growth * self.norm)
        self.norm = limited
        return self.weight * added * limited / norm


class Fira:
    """Section 7's other form, for a matrix whose rows are projected."""

    def __init__(self, weight: float, max_growth: float = 1.01):
        self.weight, self.max_growth = weight, max_growth
        self.norm: float | None = None

    def __call__(self, g: Array, p: Array, r: Array, n: Array) -> Array:
        phi = np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0)
        added = (g - p @ r) * phi
        norm = np.linalg.norm(added)
        limited = norm if self.norm is None else min(norm, self.max_growth * self.norm)
        self.norm = limited
        return self.weight * added * limited / norm


class Orthogonal:
    """Muon's update of what is outside, for a matrix whose rows are projected."""

    def __init__(self, weight: float, decay: float):
        self.weight, self.decay = weight, decay
        self.momentum: Array | float = 0.0

    def __call__(self, g: Array, p: Array) -> Array:
        new = (1 - self.decay) * g
        self.momentum = self.decay * self.momentum + new
        ahead = self.decay * self.momentum + new
        u, s, vh = np.linalg.svd(ahead - p @ (p.T @ ahead), full_matrices=False)
        s = s / np.linalg.norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        return self.weight * np.sqrt(max(g.shape)) * (u * s) @ vh


class Matrix:
    """Sections 1, 2 and 7 for one matrix: ``step(G)`` gives the update's direction.

    Args:
      left: Whether the rows are projected (``R = P^T G``) or the columns
        (``R = G P``).
      history: Length of the natural gradient's window, None for Adam alone.
    """

    def __init__(
        self,
        rank: int,
        gap: int,
        scale: float = 1.0,
        *,
        left: bool,
        history: int | None = None,
        damping: float = 1e-3,
        relative: bool = False,
        history_at_refresh: str = "keep",
        moments_at_refresh: str = "keep",
        residual: float | None = None,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
    ):
        self.rank, self.gap, self.scale, self.left = rank, gap, scale, left
        self.natural = None if history is None else Natural(history, damping, relative)
        self.history_at_refresh = history_at_refresh
        self.moments_at_refresh = moments_at_refresh
        self.adam = Adam(b1, b2, eps)
        self.residual = None if residual is None else Compensation(residual)
        self.basis: Array | None = None
        self.count = 0

    def step(self, gradient: Array, oriented_like: Array | None = None) -> Array:
        """One update; the SVD's free signs are taken from ``oriented_like``."""
        g = np.asarray(gradient, np.float64)
        if self.count % self.gap == 0:
            self._refresh(g, oriented_like)
        self.count += 1
        p = self.basis
        r = p.T @ g if self.left else g @ p
        s = r if self.natural is None else self.natural(r)
        n = self.adam(s)
        update = p @ n if self.left else n @ p.T
        if self.residual is not None:
            codimension = p.shape[0] - self.rank
            if self.left:
                update = update + self.residual(g, p @ r, r, codimension)
            else:
                update = update + self.residual(g.T, p @ r.T, r.T, codimension).T
        return self.scale * update

    def _refresh(self, g: Array, oriented_like: Array | None) -> None:
        u, _, vh = np.linalg.svd(g)
        new = u[:, : self.rank] if self.left else vh[: self.rank].T
        if oriented_like is not None:
            new = new * np.where(np.sum(new * oriented_like, axis=0) < 0, -1.0, 1.0)
        old, self.basis = self.basis, new
        if old is None:
            return
        q = new.T @ old

        def rotate(x: Array) -> Array:
            return q @ x if self.left else x @ q.T

        def rotate_squares(x: Array) -> Array:
            return (q * q) @ x if self.left else x @ (q * q).T

        if self.natural is not None:
            self.natural.move(rotate, self.history_at_refresh)
        self.adam.move(rotate, rotate_squares, self.moments_at_refresh)


def captured_energy(basis: Array, gradient: Array) -> float:
    """Share of ``|G|^2`` inside the span of orthonormal ``basis`` ``(m, r)``."""
    basis, gradient = np.asarray(basis, np.float64), np.asarray(gradient, np.float64)
    return float(np.sum((basis.T @ gradient) ** 2) / np.sum(gradient**2))


def best_energy(gradient: Array, rank: int) -> float:
    """The most that any ``rank`` directions capture."""
    s = np.linalg.svd(np.asarray(gradient, np.float64), compute_uv=False)
    return float(np.sum(s[:rank] ** 2) / np.sum(s**2))


def gradients(seed: int, steps: int, *shape: int) -> list[Array]:
    """A stream: a fixed signal, a drift and noise, as a training run has them."""
    rng = np.random.default_rng(seed)
    signal, drift = rng.normal(size=shape), rng.normal(size=shape)
    return [
        signal + 0.2 * t * drift + 0.5 * rng.normal(size=shape) for t in range(steps)
    ]
