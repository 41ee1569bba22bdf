"""Transformations of torch: no silent zeros, compiling is survived."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from problems import MODELS, images, random_l1_prior
from torch.autograd import forward_ad, functional

from deepinv_deal import DEAL, FixedPointOptim
from deepinv_deal.priors import MMRPrior
from deepinv_deal.splines import linear_spline

EVERY = pytest.mark.parametrize("name", MODELS)


def denoiser(name):
    model = MODELS[name]()
    sigma = 0.1 if name == "DEAL" else None
    y = images(1, 1, 6, 7)
    return model, y, lambda y: model(y, sigma=sigma)


def loss_of(f):
    return lambda y: f(y).square().sum()


@EVERY
@pytest.mark.parametrize("product", ["jvp", "hvp", "vhp", "penalty"])
def test_derivatives_of_derivatives_raise(name, product):
    """They were zeros, or lacked a part."""
    _, y, f = denoiser(name)
    v = torch.ones_like(y)
    with pytest.raises(RuntimeError, match="differentiable once"):
        if product == "penalty":
            y.requires_grad_()
            (g,) = torch.autograd.grad(loss_of(f)(y), y, create_graph=True)
            g.square().sum().backward()
        else:
            getattr(functional, product)(f if product == "jvp" else loss_of(f), y, v)


@EVERY
def test_first_derivatives_exist_with_create_graph(name):
    _, y, f = denoiser(name)
    y.requires_grad_()
    (plain,) = torch.autograd.grad(loss_of(f)(y), y)
    (recorded,) = torch.autograd.grad(loss_of(f)(y), y, create_graph=True)
    torch.testing.assert_close(plain, recorded.detach(), rtol=0, atol=0)
    _, product = functional.vjp(f, y.detach(), torch.ones_like(y))
    assert product.abs().max() > 0


def test_penalties_on_the_jacobian_raise():
    """deepinv's spectral norms differentiate a derivative; they gave NaN."""
    model = DEAL(pretrained=None, num_filters=4)
    x = images(1, 1, 8, 8).float().requires_grad_()
    norm = dinv.loss.JacobianSpectralNorm(max_iter=2, verbose=False)
    with pytest.raises(RuntimeError, match="differentiable once"):
        norm(model(x, sigma=0.1), x)


@EVERY
def test_forward_mode_raises(name):
    _, y, f = denoiser(name)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward mode"):
        f(forward_ad.make_dual(y, torch.ones_like(y)))


def test_forward_mode_in_a_setting_raises():
    model, y, _ = denoiser("DEAL")
    one = torch.tensor(1.0, dtype=y.dtype)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward mode"):
        model(y, sigma=0.1, lambda_reg=forward_ad.make_dual(one, one))


@EVERY
@pytest.mark.parametrize("transform", ["grad", "jvp", "jacrev", "vmap"])
def test_functional_transforms_raise(name, transform):
    _, y, f = denoiser(name)
    with pytest.raises(RuntimeError, match=r"within torch\.func"):
        if transform == "vmap":
            torch.vmap(f)(y[None])
        elif transform == "jvp":
            torch.func.jvp(f, (y,), (y,))
        else:
            getattr(torch.func, transform)(loss_of(f))(y)


def test_recording_raises():
    model = DEAL(pretrained=None, num_filters=4)
    y = images(1, 1, 8, 8).float()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record DEAL"):
        torch.jit.trace(lambda y: model(y, sigma=0.1), y, check_trace=False)
    if hasattr(torch.compiler, "is_exporting"):
        with pytest.raises(RuntimeError, match=r"torch\.export cannot record DEAL"):
            torch.export.export(model, (y,), {"sigma": 0.1})


@pytest.mark.filterwarnings("ignore:.*not compiled")
def test_within_compile_a_model_runs_as_it_is():
    model = DEAL(pretrained=None, num_filters=4).eval()
    y, backend = images(1, 1, 8, 8).float(), "eager"
    expected = model(y, sigma=0.1)
    with pytest.warns(UserWarning, match="DEAL is not compiled"):
        compiled = torch.compile(model, backend=backend)(y, sigma=0.1)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=0)

    def around(y):
        return 2 * model(y + 0, sigma=0.1)

    with torch.no_grad():
        twice = torch.compile(around, backend=backend)(y)
    torch.testing.assert_close(twice, 2 * expected, rtol=0, atol=0)


def test_the_optimizer_is_not_compiled_either():
    optim = FixedPointOptim(random_l1_prior(MMRPrior).float(), lambda_reg=0.1)
    physics, y = dinv.physics.Denoising(), images(1, 1, 8, 8).float()
    with pytest.warns(UserWarning, match="FixedPointOptim is not compiled"):
        compiled = torch.compile(optim, backend="eager")(y, physics)
    torch.testing.assert_close(compiled, optim(y, physics), rtol=0, atol=0)


def test_derivatives_of_spline_slopes_are_complete():
    """The mixed ones in argument and coefficients lacked a part."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 4, dtype=torch.float64, generator=g).requires_grad_()
    c = torch.rand(3, 5, dtype=torch.float64, generator=g).requires_grad_()
    torch.autograd.gradgradcheck(lambda x, c: linear_spline(x, c, -0.1, 0.3), (x, c))
