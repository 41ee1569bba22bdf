"""The bounds of the theory of DEAL against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from linearized import SIZE, small_problem
from problems import DOUBLE, generator, images

pytest.importorskip("bounds", reason="the scripts are not part of this distribution")

from bounds import conservative_bounds

from deepinv_deal.interpret import jacobian_norm, linearize, stability_constant


@pytest.mark.slow
def test_the_bounds_of_the_paper_hold():
    problem = small_problem("blur")
    at = problem.at
    bounds = conservative_bounds(at)
    equation = at.problem.equation
    W = equation.regularizer.W
    eye = torch.eye(SIZE**2, dtype=DOUBLE).view(-1, 1, SIZE, SIZE)
    WW = W.normal(eye).flatten(1)
    least = problem.H + 1e-4 * float(equation.lambda_reg) * WW
    smallest = float(torch.linalg.eigvalsh(least)[0])
    assert bounds.smallest_eigenvalue == pytest.approx(smallest, rel=1e-2)
    assert bounds.contraction > jacobian_norm(at)
    assert bounds.stability > stability_constant(at)
    frozen = torch.linalg.solve(problem.B, problem.A.T)
    assert bounds.lipschitz_update > float(torch.linalg.matrix_norm(frozen, 2))
    # How much the squared mask changes is below its Lipschitz bound.
    z = at.x + 0.01 * torch.randn(at.x.shape, generator=generator(2), dtype=DOUBLE)
    with torch.no_grad():
        difference = equation.mask(z).square() - at.mask.square()
    change = torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(z - at.x)
    assert float(change) < bounds.lipschitz_mask


def test_the_bound_of_stability_is_finite_for_a_small_weight():
    model = small_problem("denoising").model
    y = images(1, 1, SIZE, SIZE)
    at = linearize(model, y, sigma=0.05, lambda_reg=1e-6)
    bounds = conservative_bounds(at)
    assert bounds.contraction < 1
    assert bounds.stability == pytest.approx(
        bounds.lipschitz_update / (1 - bounds.contraction)
    )
