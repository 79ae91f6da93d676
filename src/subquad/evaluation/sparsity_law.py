"""How the share of active neurons depends on training data (Luo et al. 2024, "Sparsing Law", section 4.1)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit, differential_evolution

LEAST_POINTS = 5
BILLION = 1e9


@dataclass(frozen=True)
class SparsityLaw:
    """A fitted curve over D = tokens / 10^9.

    ``relu``: ``exp(-k D^alpha + b) + limit``, falling; ``silu``: ``limit - k / D^alpha``, rising.

    Attributes:
        kind: ``"relu"`` or ``"silu"``.
        alpha, k, b, limit: the constants; b is 0 for ``silu``.
        errors: their standard errors, by name.
        r_squared: share of the variance that the curve explains.
    """

    kind: str
    alpha: float
    k: float
    b: float
    limit: float
    errors: dict[str, float]
    r_squared: float

    def ratio(self, tokens: float) -> float:
        """The activation ratio after so many tokens."""
        return float(_CURVES[self.kind](tokens / BILLION, *self._constants()))

    def tokens_for(self, ratio: float) -> float:
        """The tokens after which the ratio is reached.

        Raises:
            ValueError: the curve never gets there.
        """
        gap = ratio - self.limit if self.kind == "relu" else self.limit - ratio
        power = 0.0
        if gap > 0:
            power = (self.b - math.log(gap)) / self.k if self.kind == "relu" else self.k / gap
        if power <= 0:
            raise ValueError(f"the curve tends to {self.limit:.4f} and never reaches a ratio of {ratio}")
        return float(BILLION * power ** (1 / self.alpha))

    def _constants(self) -> tuple[float, ...]:
        return (self.alpha, self.k, self.b, self.limit) if self.kind == "relu" else (self.alpha, self.k, self.limit)


def _falling(d: np.ndarray, alpha: float, k: float, b: float, limit: float) -> np.ndarray:
    return np.exp(-k * d**alpha + b) + limit  # type: ignore[no-any-return]


def _rising(d: np.ndarray, alpha: float, k: float, limit: float) -> np.ndarray:
    return limit - k / d**alpha


_CURVES = {"relu": _falling, "silu": _rising}


def fit_sparsity_law(tokens: Sequence[float], ratios: Sequence[float], kind: str) -> SparsityLaw:
    """Fits the law of one activation to the ratios of checkpoints of one run, all measured with one c.

    A search over the whole range of the constants finds the valley, Levenberg and Marquardt's method its bottom. Leave
    out the points of the warm-up.

    Args:
        tokens: seen by each checkpoint.
        ratios: activation ratios in (0, 1).
        kind: ``"relu"`` or ``"silu"``.

    Raises:
        ValueError: fewer than five points, values out of range, an unknown kind, or points that no curve of the kind
            fits.

    Example:
        >>> tokens = [1e9 * n for n in (5, 10, 20, 50, 100, 200)]
        >>> ratios = [0.4 - 0.1 / (t / 1e9) ** 0.5 for t in tokens]
        >>> round(fit_sparsity_law(tokens, ratios, "silu").limit, 3)
        0.4
    """
    if kind not in _CURVES:
        raise ValueError(f"kind must be 'relu' or 'silu'; got {kind!r}")
    d, a = np.asarray(tokens, dtype=np.float64) / BILLION, np.asarray(ratios, dtype=np.float64)
    if d.ndim != 1 or d.shape != a.shape or len(d) < LEAST_POINTS:
        raise ValueError(f"a law needs at least {LEAST_POINTS} pairs of tokens and ratio; got {d.shape} and {a.shape}")
    if not (np.isfinite(d).all() and (d > 0).all() and ((a > 0) & (a < 1)).all()):
        raise ValueError("tokens must be above 0 and ratios in (0, 1)")
    names = ("alpha", "k", "b", "limit") if kind == "relu" else ("alpha", "k", "limit")
    curve = _CURVES[kind]
    # alpha and log k are searched: over both ends of d the exponent changes by orders of magnitude
    bounds = [(0.02, 3.0), (-14.0, 4.0), *([(-6.0, 2.0)] if kind == "relu" else []), _limits(a, kind)]

    def constants(x: np.ndarray) -> tuple[float, ...]:
        return (x[0], math.exp(x[1]), *x[2:])

    def squares(x: np.ndarray) -> float:
        with np.errstate(over="ignore"):
            residual = curve(d, *constants(x)) - a
        total = float(residual @ residual)
        return total if math.isfinite(total) else 1e9

    start = differential_evolution(squares, bounds, seed=0, tol=1e-8, maxiter=400, popsize=15)
    try:
        with np.errstate(over="ignore"):
            found, covariance = curve_fit(curve, d, a, p0=constants(start.x), method="lm", maxfev=20_000)
    except (RuntimeError, OptimizeWarning) as error:
        raise ValueError(f"no {kind} law fits these {len(d)} points: {error}") from None
    values = dict(zip(names, (float(x) for x in found)))
    residual = curve(d, *found) - a
    spread = float(((a - a.mean()) ** 2).sum())
    r_squared = 1 - float(residual @ residual) / spread if spread > 0 else 0.0
    low, high = _limits(a, kind)
    if not low <= values["limit"] <= high or values["alpha"] <= 0 or values["k"] <= 0 or not r_squared > 0:
        raise ValueError(
            f"no {kind} law fits these {len(d)} points: the best one has limit {values['limit']:.4g}, alpha "
            f"{values['alpha']:.4g}, R2 {r_squared:.3f}"
        )
    errors = dict(zip(names, np.sqrt(np.diag(covariance)).tolist()))
    return SparsityLaw(kind, values["alpha"], values["k"], values.get("b", 0.0), values["limit"], errors, r_squared)


def _limits(ratios: np.ndarray, kind: str) -> tuple[float, float]:
    """Where the limit of a run can lie: below all of a falling curve, above most of a rising one (noise included)."""
    return (0.0, float(ratios.min())) if kind == "relu" else (float(np.median(ratios)), 1.0)
