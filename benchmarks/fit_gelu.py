"""Recomputes the coefficients of ``kernels/gelu.py`` and prints how far each form of GELU is from the exact function.

The form: with the Mills ratio of the normal distribution, Φ(-a) = exp(-a²/2) M(a), and M(a) ≈ t P(t) at t = 1/(1 + p a), for
a >= 0. The variable t is that of Hastings, "Approximations for Digital Computers" (1955), which Abramowitz and Stegun print as
7.1.26; theirs minimises the absolute error of erf, which leaves nothing of the negative tail. Here P minimises the largest
*relative* error of M, by Remez' exchange algorithm (Cheney, "Introduction to Approximation Theory", 1966, chapter 3), and p is
the best of a grid. So the error holds, in units of the last place, until the result underflows. In float32, where rounding
dominates, P is expanded in 1 - t = p a t, whose rounding errors vanish at zero with a.

For comparison: x σ(x R(min(x², 36))), R a polynomial fitted to logit(Φ(x))/x in the same way; 0.5 x (1 + erf(x/√2)), which
PyTorch computes; and the tanh form. Run ``python benchmarks/fit_gelu.py``.
"""

import functools
import math
from collections.abc import Iterable

import mpmath
import numpy as np
import torch

LAST = 14.5  # Φ(-14.5) is below float32's smallest number
GRID = 600
BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
# Per output type: P's number of coefficients, and the p to choose from, in hundredths. In float32 rounding decides: 0.44 is where
# the worst error, rounding included, is least.
CHOICES = {"bfloat16": (4, range(20, 41)), "float16": (5, range(20, 41)), "float32": (11, (44,))}


def remez(function, terms: int, low: float, high: float) -> tuple[np.ndarray, float]:
    """Coefficients c, lowest power first, of the polynomial with the least max|1 - polynomial/function| on [low, high].

    function: positive there. terms: the number of coefficients. Returns c and that error.
    """
    points = (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * np.arange(GRID + 1) / GRID)
    values = np.array([float(function(point)) for point in points])
    basis = points[:, None] ** np.arange(terms) / values[:, None]
    chosen = np.linspace(0, GRID, terms + 1).round().astype(int)
    for _ in range(50):
        system = np.hstack([basis[chosen], (-1.0) ** np.arange(terms + 1)[:, None]])
        coefficients = np.linalg.solve(system, np.ones(terms + 1))[:-1]
        error = 1 - basis @ coefficients
        changes = np.flatnonzero(np.diff(np.sign(error))) + 1
        extrema = [part[np.abs(error[part]).argmax()] for part in np.split(np.arange(GRID + 1), changes)]
        while len(extrema) > terms + 1:
            extrema.pop(0 if abs(error[extrema[0]]) < abs(error[extrema[-1]]) else -1)
        if len(extrema) < terms + 1 or np.array_equal(extrema, chosen):
            break
        chosen = np.array(extrema)
    return coefficients, np.abs(error).max()


def fit_mills(terms: int, hundredths: Iterable[int]) -> tuple[float, np.ndarray, float]:
    """(p, P's coefficients in 1 - t, lowest power first, relative error) of M(a) ≈ t P on [0, LAST]."""

    def fit(p):
        def target(s):
            a = s / (1 - s) / p
            return mpmath.exp(a * a / 2) * mpmath.erfc(a / mpmath.sqrt(2)) / 2 / (1 - s)

        return (p, *remez(target, terms, 0.0, 1 - 1 / (1 + p * LAST)))

    return min((fit(k / 100) for k in hundredths), key=lambda result: result[-1])


@functools.cache
def fit_logistic(degree: int) -> np.ndarray:
    """R's coefficients, lowest power first. An error δ of x R(x²) is a relative error of at most δ in GELU: hence the weight."""

    def target(t):
        x = mpmath.sqrt(max(t, 1e-8))
        return mpmath.log(mpmath.erfc(-x / mpmath.sqrt(2)) / mpmath.erfc(x / mpmath.sqrt(2))) / x

    points = 18 - 18 * np.cos(np.pi * (np.arange(GRID) + 0.5) / GRID)
    values = np.array([float(target(point)) for point in points])
    # Lawson's iteration: least squares whose weights grow where the error is largest, until it is level.
    weights = np.ones(GRID)
    for _ in range(400):
        scale = np.sqrt(weights * points)
        basis = (points[:, None] / 36) ** np.arange(degree + 1)
        coefficients = np.linalg.lstsq(basis * scale[:, None], values * scale, rcond=None)[0]
        error = np.abs(basis @ coefficients - values) * np.sqrt(points)
        weights *= error / error.mean()
        weights /= weights.mean()
    return coefficients / 36.0 ** np.arange(degree + 1)


def in_powers_of_t(coefficients: np.ndarray) -> np.ndarray:
    """The polynomial in 1 - t written in t, lowest power first."""
    return np.polynomial.Polynomial(coefficients)(np.polynomial.Polynomial([1, -1])).coef


def mills_form(x: np.ndarray, p: float, coefficients: np.ndarray, complement: bool) -> np.ndarray:
    """What the kernels compute, in float32; complement: the coefficients belong to powers of 1 - t."""
    a = np.abs(x)
    scaled = np.float32(p) * a
    t = np.float32(1) / (np.float32(1) + scaled)
    series = np.polyval(coefficients[::-1].astype(np.float32), scaled * t if complement else t)
    if complement:  # the kernel carries this exponent in two parts
        gauss = np.exp(-0.5 * x.astype(np.float64) ** 2).astype(np.float32)
    else:
        gauss = np.exp2(x * x * np.float32(-0.5 / math.log(2)))
    return np.maximum(x, 0) - (a * gauss) * (series * t)


def logistic_form(x: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    r = np.polyval(coefficients[::-1].astype(np.float32), np.minimum(x * x, np.float32(36)))
    return x / (np.float32(1) + np.exp(-x * r))


def torch_form(approximate: str):
    return lambda x: torch.nn.functional.gelu(torch.from_numpy(x), approximate=approximate).numpy()


def ulps(values: np.ndarray, exact: np.ndarray, bits: int) -> np.ndarray:
    """Errors in units of the last place, of a type with ``bits`` significant bits, at ``exact``."""
    return np.abs(values - exact) / np.ldexp(1.0, np.frexp(exact)[1] - bits)


def main() -> None:
    torch.set_num_threads(1)
    x = np.linspace(-13, 8, 400_000).astype(np.float32)
    x = x[x != 0]
    wide = x.astype(np.float64)
    exact = wide * 0.5 * torch.special.erfc(torch.from_numpy(-wide / math.sqrt(2))).numpy()
    ranges = {"|gelu| > 1e-3": np.abs(exact) > 1e-3, "> 1e-8": np.abs(exact) > 1e-8, "> 1e-37": np.abs(exact) > 1e-37}

    forms = {}
    for dtype, (terms, hundredths) in CHOICES.items():
        p, coefficients, error = fit_mills(terms, hundredths)
        complement = dtype == "float32"
        coefficients = coefficients if complement else in_powers_of_t(coefficients)
        print(f"{dtype}: p = {p}, relative error {error:.2e}; P from the highest power of {'1 - t' if complement else 't'} down:")
        print("    " + ", ".join(f"{c:.9g}" for c in coefficients[::-1]))
        form = functools.partial(mills_form, p=p, coefficients=coefficients, complement=complement)
        forms[f"kernels/gelu.py, {terms} terms", dtype] = form
    for degree, dtype in ((5, "bfloat16"), (6, "bfloat16"), (7, "float16")):
        form = functools.partial(logistic_form, coefficients=fit_logistic(degree))
        forms[f"logistic, degree {degree}", dtype] = form
    forms["erf as in PyTorch", "float32"] = torch_form("none")
    forms["tanh", "bfloat16"] = torch_form("tanh")

    print(f"\nlargest error before the final rounding, in ulps\n{'form':28}{'of':10}" + "".join(f"{name:>16}" for name in ranges))
    for (name, dtype), form in forms.items():
        error = ulps(form(x), exact, BITS[dtype])
        print(f"{name:28}{dtype:10}" + "".join(f"{error[where].max():16.3g}" for where in ranges.values()), flush=True)


if __name__ == "__main__":
    main()
