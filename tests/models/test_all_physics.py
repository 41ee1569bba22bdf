"""DEAL on every linear physics that the installed deepinv has, against matrices."""

import importlib
import importlib.util
import warnings

import all_physics as every
import pytest
import torch
from all_physics import CASES, LAMBDA, SIGMA
from deepinv.physics.forward import LinearPhysics, adjoint_function
from problems import DOUBLE, relative_error

from deepinv_deal.problems.data_term import DataTerm
from deepinv_deal.problems.quadratic import sliced
from deepinv_deal.solvers.frozen import LEAST_FORCE

#: What deepinv is slow for.
SLOW = ("DownsamplingMatlab", "NonCartesianMRI", "RadioInterferometry")

#: deepinv's interpolations and non-uniform transforms differ from their transposes.
ROUGH = ("Tomography", "UltrasoundPlaneWave", "NonCartesianMRI", "RadioInterferometry")

SOLVED = [
    pytest.param(case, id=case.id, marks=[pytest.mark.slow] * (case.name in SLOW))
    for case in CASES
    if case.make is not None and case.error is None
]
REFUSED = [pytest.param(c, id=c.id) for c in CASES if c.error is not None]


def test_every_class_of_deepinv_has_an_entry():
    # If this fails, deepinv has a new one: add a case to tests/all_physics.py.
    names = {case.name for case in CASES}
    assert sorted(every.classes() - names) == [] and names <= every.classes()


@pytest.fixture
def installed(case, monkeypatch):
    """Skips cases whose package is not there."""
    if case.package and importlib.util.find_spec(case.package) is None:
        pytest.skip(f"{case.name} needs the package {case.package}")
    if case.package:
        # The compiler of torch cannot read the functions of our pretended device.
        monkeypatch.setattr(torch.jit, "script", lambda function, *_, **__: function)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(case.package)


@torch.no_grad()
def matrices(case, physics, y, model, x_hat):
    """Returns A, the normal operator of the regularizer, measurements and result."""
    prior = model.prior.double()
    layout = DataTerm.of(y, physics, None, in_channels=prior.in_channels).layout
    x = layout.extract(x_hat).double()
    A = every.dense_physics(physics, layout, x.to(case.dtype))
    n = x[0].numel()
    basis = torch.eye(n, dtype=DOUBLE).view(n, *x.shape[1:])

    def level(k):
        return torch.full((k,), SIGMA, dtype=DOUBLE)  # in float32, L is off by 1e-7

    if layout.slices is None:
        R = prior.regularizer(level(x.shape[1] // prior.in_channels))
    else:
        R = sliced(lambda k: prior.regularizer(level(k)), x, layout.slices)
    mask = R.squared_mask(x)
    columns = [R.normal(e[None], mask).flatten() for e in basis]
    return A, torch.stack(columns, 1), every.real(y)[0], x.flatten()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("case", SOLVED)
def test_the_result_is_that_of_the_dense_problem(case):
    physics, y, model, x_hat, info = every.solve(case)
    assert info.converged.all() and x_hat.shape == (1, *case.shape)
    A, L, y, x = matrices(case, physics, y, model, x_hat)
    force = LAMBDA * L @ x
    # As the imbalance is defined: small forces count as LEAST_FORCE |A^T y|.
    size = max(force.norm(), LEAST_FORCE * (A.T @ y).norm())
    slack = 10 if case.name in ROUGH else 1.01
    assert (A.T @ (y - A @ x) - force).norm() < slack * case.rtol * size
    # With the mask frozen there, the linear system has no other solution.
    again = torch.linalg.solve(A.T @ A + LAMBDA * L, A.T @ y)
    assert relative_error(x, again) < 300 * case.rtol


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_solved_says_why(case):
    error, message = case.error
    with pytest.raises(error, match=message):
        every.solve(case)


def test_the_way_out_of_a_wrong_adjoint_is_one():
    # As the message says.
    case = next(c for c in CASES if c.name == "SequentialMRI")
    physics, x = case.make(), case.image()
    transpose = adjoint_function(physics.A, x.shape, dtype=x.dtype)
    mended = LinearPhysics(A=physics.A, A_adjoint=transpose)
    model = every.random_model(
        every.prior_for(case), rtol=1e-7, lambda_reg=LAMBDA, scale=None
    )
    y = physics.A(x)
    with torch.no_grad():
        x_hat, info = model(y, mended, sigma=SIGMA, return_info=True)
    assert info.converged.all()
    A, L, y, x = matrices(case, mended, y, model, x_hat)
    assert relative_error(A.T @ (y - A @ x), LAMBDA * L @ x) < 1.1e-7


def test_the_user_guide_has_this_table():
    assert every.PAGE.read_text() == every.page(), "run python tests/all_physics.py"
