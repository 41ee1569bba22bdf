"""SAFI, MMR and the dictionaries with likelihoods other than least squares."""

from dataclasses import replace

import deepinv as dinv
import pytest
import scipy.optimize
import torch
from deepinv.optim import LogPoissonLikelihood, PoissonLikelihood
from helpers import gradients_equal_finite_differences
from likelihoods import CASES, blur, truth, weights
from problems import DOUBLE, TIGHT, generator, random_l1_model, relative_error
from problems import small_model as dictionary

from deepinv_deal import (
    MMR,
    SAFI,
    AdjointOptions,
    PatchSynthesis,
    SmoothPlusSparse,
)
from deepinv_deal.optim import SmoothedL1, WeightedL2

#: Models as functions of their settings, accurate.
FAMILIES = {
    "SAFI": lambda **settings: random_l1_model(SAFI, **settings),
    "MMR": lambda **settings: random_l1_model(MMR, **settings),
    "CPR": lambda **settings: dictionary(
        SmoothPlusSparse, generator(), {"penalty": "group"}, **DICTIONARY | settings
    ),
    "NCPR": lambda **settings: dictionary(
        SmoothPlusSparse,
        generator(),
        {"penalty": "weakly_convex"},
        **DICTIONARY | settings,
    ),
    "PatchSynthesis": lambda **settings: dictionary(
        PatchSynthesis,
        generator(),
        {"mean": "free"},
        **DICTIONARY | {"solver": "fista"} | settings,
    ),
}
DICTIONARY = {"rtol": 1e-7, "max_iter": 20000, "adjoint": TIGHT}
#: Slow ones run the code of others.
SLOW = ("MMR", "NCPR")
EACH = [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FAMILIES]

#: One data term with a physics for each; the others take their time.
WITH_PHYSICS = {
    "SAFI": "LogPoisson",
    "CPR": "LogPoisson",
    "PatchSynthesis": "LogPoisson",
}
PROBLEMS = [
    pytest.param(
        family,
        name,
        blurred,
        id=f"{family}-{name}-{'blur' if blurred else 'denoising'}",
        marks=[pytest.mark.slow]
        * (family in SLOW or (blurred and name != WITH_PHYSICS.get(family))),
    )
    for family in FAMILIES
    for name in CASES
    for blurred in (False, True)
]


def mild_blur():
    """A blur that leaves the systems well conditioned."""
    kernel = torch.tensor([[1.0, 2, 1], [2, 30, 2], [1, 2, 3]], dtype=DOUBLE)
    return dinv.physics.Blur(kernel[None, None] / kernel.sum(), padding="circular")


def call_for(family, weight):
    """Arguments that regularize moderately, for the weight that suits DEAL."""
    if family in ("SAFI", "MMR"):
        return {"lambda_reg": 0.05 * weight}
    return {"lambda_reg": 0.02, "beta": weight}


def fidelity_gradient(fidelity, x, y, physics):
    z = x.detach().requires_grad_()
    if isinstance(fidelity, dinv.optim.L1):  # smoothed
        fidelity = SmoothedL1()
    return torch.autograd.grad(fidelity(z, y, physics).sum(), z)[0]


@pytest.mark.parametrize(("family", "name", "blurred"), PROBLEMS)
def test_solution_solves_the_equation_of_deepinvs_data_fidelity(family, name, blurred):
    make, measure, weight = CASES[name]
    physics = mild_blur() if blurred else dinv.physics.Denoising()
    y, fidelity = measure(physics.A(truth())), make(1)
    model = FAMILIES[family](data_fidelity=fidelity, bounds=None)
    problem = model.pose(y, physics, **call_for(family, weight))
    x, result = model.solve(problem)
    assert result.converged.all()
    equation, data = problem.equation, problem.data
    image = data.unscaled(equation.image(x))
    # SAFI and MMR rescale images to the noise level that their weights are for.
    gradient = data.intensity * fidelity_gradient(fidelity, image, y, physics)
    if family in ("SAFI", "MMR"):
        x, w = equation.unpair(x)
        regularizer, Wx = equation.regularizer, equation.regularizer.analyse(x)
        bound = equation.bound(regularizer.mask(x, Wx))
        assert relative_error(regularizer.adjoint(w), -gradient) < 1e-6
        assert (w.abs() <= bound * (1 + 1e-6)).all()
        assert (w * Wx - bound * Wx.abs()).abs().max() < 1e-6 * bound.max()
    else:
        p, (a, *_) = equation.problem, result.state
        features = p.features(x)
        pull = p.features_adjoint(features - p.synthesis(a))
        assert relative_error(pull, -gradient) < 1e-6
        assert relative_error(p.threshold(a, features), a) < 1e-4


def least(function, *start):
    """The least value that scipy finds of a function of tensors, from a start."""
    sizes, shapes = [v.numel() for v in start], [v.shape for v in start]

    def value(v):
        parts = torch.from_numpy(v).split(sizes)
        tensors = [
            p.view(shape).detach().requires_grad_()
            for p, shape in zip(parts, shapes, strict=True)
        ]
        out = function(*tensors)[0]
        slopes = torch.autograd.grad(out, tensors)
        return out.item(), torch.cat([s.flatten() for s in slopes]).numpy()

    options = {"maxiter": 5000, "maxfun": 5000, "ftol": 1e-14, "gtol": 1e-8}
    v = torch.cat([v.detach().flatten() for v in start]).numpy()
    found = scipy.optimize.minimize(
        value, v, jac=True, method="L-BFGS-B", options=options
    )
    return found.fun


@pytest.mark.parametrize(
    "name",
    ["LogPoisson", pytest.param("Poisson", marks=pytest.mark.slow)],
)
def test_cpr_has_the_energy_of_a_generic_convex_solver(name):
    make, measure, weight = CASES[name]
    physics = blur()
    y = measure(physics.A(truth()))
    model = FAMILIES["CPR"](data_fidelity=make(1))
    call = {"beta": weight, "lambda_reg": 0.02}
    with torch.no_grad():
        _, info = model(y, physics, **call, return_info=True)
        problem = model.pose(y, physics, **call).equation.problem
    far = 0.9 * truth(), info.coefficients + 0.01
    assert problem.objective(*far).item() > 1.001 * info.objective.item()
    best = least(problem.objective, *far)
    assert info.objective.item() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("name", ["Poisson", "LogPoisson", "SmoothedL1"])
def test_mmr_lowers_its_energy_to_a_minimum(name):
    make, measure, weight = CASES[name]
    physics = dinv.physics.Denoising()
    y = measure(physics.A(truth()))
    model = FAMILIES["MMR"](data_fidelity=make(1), bounds=None, verify_energy=True)
    weight = 0.05 * weight
    x, info = model(y, physics, lambda_reg=weight, return_info=True)
    size = info.energy.abs().max()
    assert (info.energy.diff(dim=0) <= 1e-6 * size).all()
    assert (info.energy[0] - info.energy[-1]) > 1e-4 * size
    best = least(lambda x: model.energy(x, y, physics, weight), x)
    assert float(info.energy[-1]) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("family", EACH)
def test_batch_equals_singles(family):
    make, measure, weight = CASES["Poisson"]
    y = measure(truth(2))
    model = FAMILIES[family](data_fidelity=make(1), rtol=1e-2)
    call = call_for(family, weight)
    together = model(y, dinv.physics.Denoising(), **call)
    for i in range(2):
        alone = model(y[i : i + 1], dinv.physics.Denoising(), **call)
        assert relative_error(together[i : i + 1], alone) < 1e-6


@pytest.mark.parametrize(
    "kind",
    [
        "Poisson",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("LogPoisson", "WeightedL2")
        ),
        pytest.param("SmoothedL1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "solver", [pytest.param("fista", marks=pytest.mark.slow), "two-step", "SAFI"]
)
def test_gradients(solver, kind, rng):
    _, measure, weight = CASES[kind]
    y, physics = measure(truth()), dinv.physics.Denoising()
    if solver == "SAFI":
        accurate = AdjointOptions(smoothing=1e-7, rtol=1e-10, max_iter=300)
        model = FAMILIES["SAFI"](bounds=None, rtol=1e-12, adjoint=accurate)
    else:
        limits = {} if solver == "fista" else {"rtol": None, "max_iter": None}
        settings = {"rtol": 1e-10, "max_iter": 100000, **limits}
        model = FAMILIES["PatchSynthesis"](solver=solver, **settings)
    call = call_for(solver, weight)
    makers = {
        "Poisson": lambda p: PoissonLikelihood(p, 1.0),
        "LogPoisson": lambda p: LogPoissonLikelihood(300.0, p),
        "SmoothedL1": lambda _: SmoothedL1(0.15),
        "WeightedL2": lambda p: WeightedL2(p * weights()),
    }
    parameter = {"Poisson": 0.05, "LogPoisson": 0.8, "WeightedL2": 1.0}.get(kind)
    tensors = [y] + [torch.tensor([v], dtype=DOUBLE) for v in call.values()]
    if parameter is not None:
        tensors += [torch.tensor([parameter], dtype=DOUBLE)]
    target = truth()

    def run(y, *values):
        settings = dict(zip(call, values, strict=False))
        model.data_fidelity = makers[kind](*values[len(call) :] or [None])
        if solver == "two-step":
            equation = model.equation(y, physics, **settings)
            equation = replace(equation, inner_rtol=1e-12)
            x, _ = equation.solve(equation.start(None), max_iter=2)
        else:
            x = model(y, physics, **settings)
        return (x - target).square().sum()

    # The kinks of SAFI are close together.
    accuracy = {"rtol": 1e-3, "h": 1e-5} if solver == "SAFI" else {"h": 1e-4}
    gradients_equal_finite_differences(run, tensors, rng, **{"rtol": 1e-5} | accuracy)


@pytest.mark.parametrize(("family", "least"), [("SAFI", 1.0), ("CPR", 0.0)])
def test_weighted_least_squares(family, least):
    """Weights are those of a mask with their roots."""
    scale = 4.0
    w = torch.where(weights() > 1, 4.0, least)
    y, call = truth(), call_for(family, 2.0)
    mask = dinv.physics.Inpainting(w.shape[1:], mask=w[0].sqrt())
    rtol = 1e-4 if family == "SAFI" else 1e-6
    expected = FAMILIES[family](rtol=rtol, scale=scale)(w.sqrt() * y, mask, **call)
    model = FAMILIES[family](rtol=rtol, scale=scale, data_fidelity=WeightedL2(w))
    blank = dinv.physics.Inpainting(w.shape[1:], mask=torch.ones_like(w[0]))
    found = model(y, blank, **call)
    assert relative_error(found, expected) < 1e-3
    assert relative_error(model(y + 0.1 * (w == 0), blank, **call), found) < 1e-3
