"""FrozenIteration in deepinv's BaseOptim, and our FixedPointOptim."""

import deepinv as dinv
import pytest
import torch
from deepinv.optim import BaseOptim, DEQConfig
from problems import DOUBLE, images, random_model, random_prior, relative_error

from deepinv_deal import (
    ConvergenceWarning,
    FixedPointOptim,
    FrozenIteration,
    MMRPrior,
    SAFIPrior,
    SolverOptions,
)

SIGMA, LAMBDA = 0.1, 0.7

#: Backward pass to rounding error, in deepinv's words.
TIGHT = DEQConfig(
    anderson_acceleration_backward=True, eps_backward=1e-12, max_iter_backward=300
)


@pytest.fixture
def physics():
    # Without zeros, for a small condition number and few iterations.
    mask = 0.6 + 0.4 * (images(1, 1, 9, 8, seed=5)[0] > 0.5).double()
    return dinv.physics.Inpainting((1, 9, 8), mask=mask)


def plain(prior, **kwargs):
    """deepinv's own loop around our iteration."""
    return BaseOptim(
        FrozenIteration(rtol=1e-12),
        params_algo={"lambda": LAMBDA, "g_param": SIGMA, "stepsize": 1.0},
        data_fidelity=dinv.optim.L2(),
        prior=prior,
        trainable_params=[],
        **{"max_iter": 200, "thres_conv": 1e-10, "early_stop": True, **kwargs},
    )


def ours(prior, **kwargs):
    settings = {"rtol": 1e-12, "max_iter": 500, "DEQ": TIGHT, **kwargs}
    return FixedPointOptim(prior, lambda_reg=LAMBDA, sigma=SIGMA, **settings)


def weight_gradients(loss, prior):
    parameters = [p for n, p in prior.named_parameters() if "kappa" not in n]
    gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([g.flatten() for g in gradients])


def test_frozen_iteration_runs_in_plain_base_optim(physics):
    prior, y = random_prior(), physics(images(2, 1, 9, 8))
    optimizer = plain(prior)
    x = optimizer(y, physics)
    assert optimizer.has_converged
    assert relative_error(x, ours(prior)(y, physics)) < 1e-9


def test_deq_of_deepinv_gives_the_same_gradients(physics):
    prior, x_gt = random_prior(), images(2, 1, 9, 8)
    y = physics(x_gt)
    config = DEQConfig(max_iter_backward=200)
    theirs = (plain(prior, DEQ=config)(y, physics) - x_gt).square().sum()
    mine = (ours(prior)(y, physics) - x_gt).square().sum()
    expected = weight_gradients(theirs, prior)
    assert relative_error(weight_gradients(mine, prior), expected) < 1e-7


def test_unrolled_gradients_approach_the_implicit_ones(physics):
    prior, x_gt = random_prior(), images(1, 1, 9, 8)
    y = physics(x_gt)
    theirs = plain(prior, unfold=True, max_iter=12, early_stop=False)
    loss = (theirs(y, physics) - x_gt).square().sum()
    mine = (ours(prior)(y, physics) - x_gt).square().sum()
    expected = weight_gradients(loss, prior)
    assert relative_error(weight_gradients(mine, prior), expected) < 1e-5


def test_data_fidelity_weight_divides_lambda(physics):
    prior, y = random_prior(), physics(images(1, 1, 9, 8))
    # 1 / (2 s^2) ||Ax - y||^2 + lambda R  is  1/2 ||Ax - y||^2 + s^2 lambda R.
    x = ours(prior, data_fidelity=dinv.optim.L2(sigma=0.5))(y, physics)
    expected = ours(prior)(y, physics, lambda_reg=0.25 * LAMBDA)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param({"data_fidelity": dinv.optim.L1()}, "data_fidelity must", id="L1"),
        pytest.param({"prior": dinv.optim.TVPrior()}, "prior must be", id="TV"),
    ],
)
def test_other_data_fidelities_and_priors_are_refused(physics, kwargs, message):
    settings = {"prior": random_prior(), **kwargs}
    optimizer = FixedPointOptim(settings.pop("prior"), sigma=SIGMA, **settings)
    with pytest.raises(TypeError, match=message):
        optimizer(images(1, 1, 9, 8), physics)


def test_missing_sigma_is_named(physics):
    with pytest.raises(ValueError, match="sigma is missing"):
        FixedPointOptim(random_prior())(images(1, 1, 9, 8), physics)


def test_answer_holds_what_was_asked_for(physics):
    optimizer, x = ours(random_prior()), images(2, 1, 9, 8)
    y = physics(x)
    x_hat, metrics, info = optimizer(
        y, physics, x_gt=x, compute_metrics=True, return_info=True
    )
    assert torch.equal(optimizer(y, physics), x_hat)
    n = int(info.n_iter.max())
    assert len(metrics["psnr"]) == 2 and len(metrics["psnr"][0]) == n + 1
    assert len(metrics["residual"][1]) == n
    assert metrics["nonlinear_residual"][0][-1] <= 1e-12
    assert optimizer.has_converged


def test_has_converged_is_reset(physics):
    optimizer, y = ours(random_prior()), physics(images(1, 1, 9, 8))
    optimizer(y, physics)
    optimizer.max_iter = 1
    with pytest.warns(ConvergenceWarning):
        optimizer(y, physics)
    assert not optimizer.has_converged


def test_caller_keeps_its_list_of_trainable_parameters():
    names = ["lambda_reg", "g_param"]
    optimizer = ours(random_prior(), trainable_params=names)
    assert names == ["lambda_reg", "g_param"]
    assert {n for n, _ in optimizer.named_parameters() if "params_algo" in n} == {
        "params_algo.lambda.0",
        "params_algo.g_param.0",
    }


def test_it_solves_what_the_model_solves(physics):
    y = physics(images(1, 1, 9, 8))
    expected = random_model(rtol=1e-12)(y, physics, sigma=SIGMA, lambda_reg=LAMBDA)
    torch.testing.assert_close(
        ours(random_prior())(y, physics), expected, rtol=0, atol=0
    )
    assert expected.dtype == DOUBLE


@pytest.mark.parametrize("prior_type", [SAFIPrior, MMRPrior])
def test_priors_that_are_not_quadratic_run_too(prior_type):
    prior = prior_type(4).double()
    y = images(2, 1, 9, 8)
    optimizer = FixedPointOptim(prior, lambda_reg=0.05, rtol=1e-6)
    x, result = optimizer(y, dinv.physics.Denoising(), return_info=True)
    assert result.converged.all() and x.shape == y.shape
    assert (x != y).any()
    told = FixedPointOptim(prior, lambda_reg=0.05, solver=SolverOptions(anderson=2))
    with pytest.raises(ValueError, match=f"anderson=2 .* {prior_type.__name__[:-5]}"):
        told(y, dinv.physics.Denoising())


def test_an_inner_solve_that_is_cut_short_is_told(physics):
    y, config = physics(images(1, 1, 9, 8)), DEQConfig(max_iter_backward=1)
    optimizer = plain(random_prior(), max_iter=2, DEQ=config)
    optimizer.fixed_point.iterator.solver = SolverOptions(
        preconditioner="none", inner_max_iter=2
    )
    with pytest.warns(ConvergenceWarning, match="inner solve of FrozenIteration"):
        loss = optimizer(y, physics).sum()
    with pytest.warns(ConvergenceWarning, match="inner solve of FrozenIteration"):
        loss.backward()
