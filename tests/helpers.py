"""Small problems with known answers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deepinv_deal._batch import norm
from deepinv_deal.solvers import LinearProblem, SolverResult, conjugate_gradient

LinearMap = Callable[[Tensor], Tensor]


def random(rng: torch.Generator, *shape: int, dtype=torch.float64) -> Tensor:
    """Standard normal numbers, drawn in float64 so that every dtype sees the same."""
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


# -- linear maps and systems ---------------------------------------------------


def dense_matrix(linear_map: LinearMap, shape: tuple[int, ...]) -> Tensor:
    """The matrix of a map of single samples of the given shape (float64)."""
    n = math.prod(shape)
    return linear_map(torch.eye(n, dtype=torch.float64).view(n, *shape)).flatten(1).T


def spd_matrix(rng: torch.Generator, n: int, cond: float = 10.0) -> Tensor:
    """A symmetric matrix ``(n, n)`` with eigenvalues spread over ``[1, cond]``."""
    q, _ = torch.linalg.qr(random(rng, n, n))
    eigenvalues = torch.logspace(0, math.log10(cond), n, dtype=torch.float64)
    matrix = (q * eigenvalues) @ q.T
    return (matrix + matrix.T) / 2


def spd_system(
    rng: torch.Generator, n: int, conds: tuple[float, ...], dtype=torch.float64
) -> tuple[Tensor, Tensor]:
    """Matrices ``(B, n, n)`` of given condition, right-hand sides ``(B, n)``."""
    matrices = torch.stack([spd_matrix(rng, n, cond) for cond in conds])
    return matrices.to(dtype), random(rng, len(conds), n, dtype=dtype)


def batched_map(matrices: Tensor) -> LinearMap:
    """
    Multiplies every sample by its matrix, in arithmetic independent of the batch.

    Batched matrix products round differently for different batch sizes, which would
    hide whether a solver treats samples independently.
    """
    return lambda v: torch.stack([m @ w for m, w in zip(matrices, v, strict=True)])


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def central_difference(
    function: Callable[[Tensor], Tensor],
    point: Tensor,
    direction: Tensor,
    h: float = 1e-5,
) -> Tensor:
    """The derivative of a function of one tensor along a direction."""
    with torch.no_grad():
        return (function(point + h * direction) - function(point - h * direction)) / (
            2 * h
        )


def slope_in_place(
    function: Callable[[], Tensor], tensor: Tensor, direction: Tensor, h: float
) -> Tensor:
    """The derivative along a direction of a tensor that the function holds."""

    def at(t: float) -> Tensor:
        tensor.add_(t * direction)
        value = function()
        tensor.sub_(t * direction)
        return value

    return central_difference(at, 0.0, 1.0, h)


def gradients_equal_finite_differences(run, tensors, rng, rtol=1e-5, h=1e-4):
    """Compares along a random direction in which every tensor contributes alike."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(run(*tensors), tensors)
    directions = []
    for tensor, gradient in zip(tensors, gradients, strict=True):
        direction = random(rng, *tensor.shape)
        slope = (gradient * direction).sum()
        assert slope.abs() > 1e-6, "nothing to compare"
        directions.append(direction / slope)

    def along(t):
        return run(*[x + t * d for x, d in zip(tensors, directions, strict=True)])

    size = max(float(d.abs().max()) for d in directions)
    zero, one = (
        torch.zeros((), dtype=torch.float64),
        torch.ones((), dtype=torch.float64),
    )
    actual = central_difference(along, zero, one, h / size)
    expected = torch.tensor(float(len(tensors)), dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)


# -- fixed points --------------------------------------------------------------


class FrozenMap(LinearProblem):
    """The problem ``x = T(z)`` with ``z`` frozen: one application of T solves it."""

    def __init__(self, T: LinearMap, x: Tensor):
        self.x, self.r = x, T(x) - x
        self.residual = norm(self.r)

    def correction(self, r: Tensor, rtol: Tensor, active: Tensor) -> SolverResult:
        done = torch.zeros_like(self.residual, dtype=torch.int64)
        return SolverResult(r, done.to(torch.int8), done + 1, torch.zeros_like(rtol))


class FrozenSystem(LinearProblem):
    """A linear system ``A x = b``, corrected from ``x`` by conjugate gradients."""

    def __init__(self, A: LinearMap, b: Tensor, x: Tensor, max_iter: int):
        self.A, self.x, self.max_iter = A, x, max_iter
        self.r = b - A(x)
        self.residual = norm(self.r) / norm(b)

    def correction(
        self, r: Tensor, rtol: Tensor, active: Tensor | None = None
    ) -> SolverResult:
        return conjugate_gradient(self.A, r, rtol=rtol, max_iter=self.max_iter)


class CoupledEquation:
    r"""
    A small nonlinear equation with the structure of DEAL.

    .. math::
        F(x) = b - K x - s \, m(x) \odot x, \qquad
        K = I + L L^{\top}, \quad m(x) = \tfrac{1}{2} (1 + \tanh(C x)).

    With :math:`m` frozen it is symmetric positive definite; its Jacobian is not
    symmetric, so a missing transpose cannot go unnoticed.
    """

    names = ("b", "L", "s", "C")

    def __init__(self, b: Tensor, L: Tensor, s: Tensor, C: Tensor, max_iter: int = 100):
        self.b, self.L, self.s, self.C, self.max_iter = b, L, s, C, max_iter

    @classmethod
    def draw(
        cls, rng: torch.Generator, n_samples: int, n: int = 6, dtype=torch.float64
    ):
        """An equation with random parameters of moderate size."""
        return cls(
            2 * random(rng, n_samples, n, dtype=dtype),
            random(rng, n, n, dtype=dtype) / n**0.5,
            torch.tensor(1.5, dtype=dtype),
            random(rng, n, n, dtype=dtype) / n**0.5,
        )

    def replace(self, **parameters: Tensor) -> CoupledEquation:
        """The same equation with other parameters."""
        merged = {name: getattr(self, name) for name in self.names} | parameters
        return CoupledEquation(**merged, max_iter=self.max_iter)

    def sample(self, i: int) -> CoupledEquation:
        """The equation of one sample alone."""
        return self.replace(b=self.b[i : i + 1])

    def weights(self, x: Tensor) -> Tensor:
        return self.s * 0.5 * (1 + torch.tanh(x @ self.C.T))

    def normal(self, x: Tensor, weights: Tensor) -> Tensor:
        return x + (x @ self.L) @ self.L.T + weights * x

    def __call__(self, x: Tensor) -> Tensor:
        return self.b - self.normal(x, self.weights(x))

    def freeze(self, x: Tensor) -> FrozenSystem:
        weights = self.weights(x)
        return FrozenSystem(lambda v: self.normal(v, weights), self.b, x, self.max_iter)

    def adjoint_solver(self, x: Tensor):
        with torch.no_grad():
            return self.freeze(x).correction
