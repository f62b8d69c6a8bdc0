"""The published code's optimizer in NumPy float64, one tensor at a time.

From the description of what selfsupervised-ai/Natural-GaLore and tensorly do, in loops
and unfoldings; nothing is shared with the library.
"""

import numpy as np

Array = np.ndarray


def unfold(x: Array, k: int) -> Array:
    """Mode ``k`` as rows, all others as columns."""
    return np.moveaxis(x, k, 0).reshape(x.shape[k], -1)


def times(x: Array, matrix: Array, k: int) -> Array:
    """The product of ``x`` with ``matrix`` along mode ``k``."""
    return np.moveaxis(np.tensordot(matrix, x, axes=(1, k)), 0, k)


def core(x: Array, factors: list[Array], skip: int | None = None) -> Array:
    for k, u in enumerate(factors):
        x = x if k == skip else times(x, u.T, k)
    return x


def expand(x: Array, factors: list[Array]) -> Array:
    for k, u in enumerate(factors):
        x = times(x, u, k)
    return x


def left_vectors(x: Array, k: int, rank: int) -> Array:
    u = np.linalg.svd(unfold(x, k), full_matrices=True)[0][:, :rank]
    for j in range(rank):
        u[:, j] *= np.sign(u[np.argmax(np.abs(u[:, j])), j])
    return u


def tucker(x: Array, rank: int, sweeps: int = 100, tolerance: float = 1e-4):
    """HOSVD, then HOOI until the relative error changes by less than ``tolerance``.

    Returns:
      The factors and the relative error of the reconstruction.
    """
    ranks = [min(rank, n) for n in x.shape]
    factors = [left_vectors(x, k, r) for k, r in enumerate(ranks)]
    errors = []
    for sweep in range(sweeps):
        for k, r in enumerate(ranks):
            factors[k] = left_vectors(core(x, factors, skip=k), k, r)
        rest = x - expand(core(x, factors), factors)
        errors.append(np.linalg.norm(rest) / np.linalg.norm(x))
        if sweep > 1 and abs(errors[-2] - errors[-1]) < tolerance:
            break
    return factors, errors[-1]


def online_slope(x: Array, factors: list[Array]) -> list[Array]:
    """Derivative of ``|x - x P_1 ... P_d|^2``, ``P_k = U_k U_k^T``, by each ``U_k``."""
    rest = x - expand(core(x, factors), factors)
    slopes = []
    for k, u in enumerate(factors):
        others = x
        for j, v in enumerate(factors):
            others = others if j == k else times(others, v @ v.T, j)
        product = unfold(rest, k) @ unfold(others, k).T
        slopes.append(-2 * (product + product.T) @ u)
    return slopes


class AdamW:
    """PyTorch's, on one array: decay of 0.01 first, then the step."""

    def __init__(self):
        self.t, self.m, self.v = 0, 0.0, 0.0

    def __call__(self, x: Array, slope: Array, rate: float) -> Array:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * slope
        self.v = 0.999 * self.v + 0.001 * slope**2
        root = np.sqrt(self.v / (1 - 0.999**self.t))
        x = x * (1 - 0.01 * rate)
        return x - rate * self.m / (1 - 0.9**self.t) / (root + 1e-8)


class Published:
    """One parameter; ``projected=False`` is a parameter of the other group."""

    def __init__(self, mode, rank, gap, scale, history, damping, b1, b2, eps, decay):
        self.mode, self.rank, self.gap, self.scale = mode, rank, gap, scale
        self.history, self.damping = history, damping
        self.b1, self.b2, self.eps, self.decay = b1, b2, eps, decay
        self.t, self.m, self.v = 0, 0.0, 0.0
        self.factors, self.columns = None, []

    def step(self, w: Array, g: Array, rate: float, ratio: float) -> Array:
        """The parameter after one step with gradient ``g``."""
        projected, online = self.mode is not None, "online" in (self.mode or "")
        first = self.factors is None
        x = g
        if projected:
            if first or (not online and self.t % self.gap == 0):
                # A fixed number of sweeps, far beyond what the tolerance asks for.
                self.factors, _ = tucker(g, self.rank, sweeps=10, tolerance=0.0)
                self.optimizers = [AdamW() for _ in self.factors]
            x = core(g, self.factors)
            if "natural" in self.mode:
                x = self.natural(x.ravel()).reshape(x.shape)
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * x
        self.v = self.b2 * self.v + (1 - self.b2) * x**2
        size = rate * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        n = self.m / (np.sqrt(self.v) + self.eps)
        if projected:
            n = self.scale * expand(n, self.factors)
        if online and not first:
            slopes = online_slope(g / np.linalg.norm(g), self.factors)
            self.factors = [
                move(u, slope, ratio / self.gap)
                for move, u, slope in zip(self.optimizers, self.factors, slopes)
            ]
        w = w - size * n
        return w - rate * self.decay * w

    def natural(self, c: Array) -> Array:
        self.columns = [*self.columns, c][-self.history :]
        h = np.stack(self.columns, axis=1)
        inner = np.eye(h.shape[1]) + h.T @ h / self.damping
        correction = h @ np.linalg.solve(inner, h.T @ c)
        return c / self.damping - correction / self.damping**2
