"""Arithmetic on measurements: one tensor ``(B, ...)``, or several, a TensorList."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepinv.utils import TensorList
from torch import Tensor

from deepinv_deal._batch import expand

#: Counts that deviate from whole numbers by more than this, or by rounding, are none.
WHOLE_ATOL = 1e-2


def each(function: Callable[..., Tensor], *arguments: Any) -> Any:
    """Applies a function to one measurement tensor, or to each of several."""
    if isinstance(arguments[0], TensorList):
        return TensorList([function(*parts) for parts in zip(*arguments, strict=True)])
    return function(*arguments)


def squared(r: Tensor) -> Tensor:
    """Returns the squared moduli."""
    return (r * r.conj()).real if r.is_complex() else r * r


def total(values: Any) -> Tensor:
    """Returns the sum over all measurements of every sample, ``(B,)``."""
    parts = list(values) if isinstance(values, TensorList) else [values]
    return torch.stack([part.flatten(1).sum(1) for part in parts]).sum(0)


def mean(values: Any, seen: Any) -> Tensor:
    """Returns the mean over the measurements that are seen, ``(B,)``."""
    number = total(each(torch.Tensor.long, seen))
    sums = total(each(lambda v, s: v.where(s, 0), values, seen))
    return sums / number.to(sums)


def parameter(value: Any, like: Tensor) -> Tensor:
    """Returns a parameter in a form that multiplies measurements ``(B, ...)``."""
    value = torch.as_tensor(value, dtype=like.dtype.to_real(), device=like.device)
    return expand(value, like) if value.ndim == 1 else value


def whole(counts: Tensor) -> Tensor:
    """Whether counts are whole numbers, up to rounding."""
    rounding = 8 * torch.finfo(counts.dtype).eps * counts.abs()
    error = (counts - counts.round()).abs()
    return (error <= torch.clamp(rounding, min=WHOLE_ATOL)).all()


def whitening(covariance: Any) -> Tensor:
    r"""Returns R with :math:`R^H R = \Psi^{-1}`."""
    matrix = covariance if isinstance(covariance, Tensor) else torch.empty(0)
    if not (matrix.is_floating_point() or matrix.is_complex()):
        matrix = matrix.to(torch.get_default_dtype())
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if square and torch.allclose(matrix, matrix.mH, rtol=1e-4):
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed):
            eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            return torch.linalg.solve_triangular(factor, eye, upper=False)
    given = isinstance(covariance, Tensor)
    shape = tuple(matrix.shape) if given else type(covariance).__name__
    raise ValueError(
        "data_fidelity: the covariance of CorrelatedL2 must be a square, symmetric (or "
        f"Hermitian) and positive definite matrix, got {shape}."
    )


def mixed(matrix: Tensor, v: Tensor, dim: int) -> Tensor:
    """
    Multiplies one dimension of measurements by a matrix.

    :param torch.Tensor matrix: ``(N, N)``; a complex one multiplies the complex numbers
        of real measurements ``(B, 2, ...)``.
    :param torch.Tensor v: the measurements.
    :param int dim: the dimension, of size N.
    """
    if not -v.ndim <= dim < v.ndim or v.shape[dim] != len(matrix):
        raise ValueError(
            f"data_fidelity: the covariance of CorrelatedL2 is for {len(matrix)} "
            f"channels in dimension {dim} of the measurements, got {tuple(v.shape)}."
        )
    dim = dim % v.ndim
    matrix = matrix.to(v.device, v.dtype if v.is_complex() else v.dtype.to_complex())
    pair = not v.is_complex()
    if pair and not bool(matrix.imag.any()):
        return torch.movedim(torch.tensordot(matrix.real, v, ([1], [dim])), 0, dim)
    if pair:  # real and imaginary part in dimension 1
        v = torch.view_as_complex(v.movedim(1, -1).contiguous())
        dim = dim - 1
    product = torch.tensordot(matrix, v, ([1], [dim])).movedim(0, dim)
    return torch.view_as_real(product).movedim(-1, 1) if pair else product
