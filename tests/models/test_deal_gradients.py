"""Implicit gradients of the full reconstruction against finite differences."""

import deepinv as dinv
import pytest
import torch
import torch.nn.functional as F
from problems import (
    DOUBLE,
    dense,
    generator,
    images,
    random_model,
    random_prior,
    relative_error,
)

from deepinv_deal import AdjointOptions, ConvergenceWarning
from deepinv_deal.priors.deal import MASK_MAX, MASK_MIN

#: Small, to keep the distance to the next kink large.
HEIGHT, WIDTH = 7, 6
EXACT = {"rtol": 1e-13, "max_iter": 1000, "scale": None}
JACOBIAN_FREE = AdjointOptions(jacobian_free=True, rtol=1e-13)


def blur():
    kernel = torch.tensor([[1.0, 2, 1], [2, 25, 2], [1, 2, 3]], dtype=DOUBLE)
    kernel = (kernel / kernel.sum())[None, None]
    return dinv.physics.Blur(kernel, padding="circular")


def inpainting():
    # A mask of fractions without zeros, to be differentiated. Zeros would make the
    # problem so ill-conditioned that a residual of 1e-13 leaves an error of 1e-10.
    mask = 0.2 + 0.8 * (images(1, 1, HEIGHT, WIDTH, seed=5)[0] > 0.5)
    return dinv.physics.Inpainting((1, HEIGHT, WIDTH), mask=mask.double())


PHYSICS = {"denoising": lambda: None, "inpainting": inpainting, "blur": blur}


class Problem:
    """A loss as a function of everything that the reconstruction depends on."""

    def __init__(self, physics_name: str, batch: int):
        self.model = random_model(random_prior(gain=20.0), **EXACT)
        self.physics = PHYSICS[physics_name]()
        x = images(batch, 1, HEIGHT, WIDTH)
        y = x if self.physics is None else self.physics.A(x)
        noise = torch.randn(y.shape, generator=generator(7), dtype=DOUBLE)
        sigma = torch.linspace(0.07, 0.11, batch, dtype=DOUBLE)
        weight = torch.linspace(0.5, 1, batch, dtype=DOUBLE)
        self.inputs = {"y": y + 0.05 * noise, "sigma": sigma}
        if self.physics is not None:
            self.inputs["lambda_reg"] = weight
        name = {"inpainting": "mask", "blur": "filter"}.get(physics_name)
        if name is not None:
            self.inputs[f"physics.{name}"] = getattr(self.physics, name)
        for value in self.inputs.values():
            value.requires_grad_()
        prior = self.model.prior
        weights = {n: p for n, p in prior.named_parameters()}
        if self.physics is not None:
            weights.pop("kappa.coefficients")  # the learned weight for denoising only
        self.variables = {**weights, **self.inputs}
        with torch.no_grad():
            self.solution = self.solve()[0]

    def solve(self, init=None, rtol=None):
        inputs = {k: v for k, v in self.inputs.items() if "." not in k}
        model = self.model
        if rtol is not None:
            model = random_model(model.prior, **{**EXACT, "rtol": rtol})
        return model(
            inputs.pop("y"), self.physics, init=init, return_info=True, **inputs
        )

    def loss(self, x_hat):
        # Small at the solution, so that differences of the loss are accurate.
        weights = torch.randn(x_hat.shape, generator=generator(8), dtype=DOUBLE)
        error = x_hat - self.solution
        return (weights * error + 0.5 * error.square()).sum()

    def kinks(self, x_hat, info) -> list[torch.Tensor]:
        """On which side of every knot, absolute value, clip and maximum we are."""
        prior = self.model.prior
        network, levels = prior.mask_network, 255 * info.sigma
        bound = network.bind(levels)
        sides = []

        def spline(bound_spline, t):
            cell = ((t - bound_spline.x_min) / bound_spline.step).floor()
            # Beyond the outer knots the spline has no kinks.
            sides.append(cell.clamp(0, bound_spline.coefficients.shape[1] - 2))
            return bound_spline(t)

        t = bound.W(x_hat)
        for phi, kernel in zip(bound.phi, (*bound.V, None), strict=True):
            sides.append(t.sign())
            t = t.abs() if kernel is not None else bound.alpha * t.abs()
            t = spline(phi, t)
            if kernel is not None:
                t = F.conv2d(t, kernel, padding=1)
        sides += [t > MASK_MIN, t < MASK_MAX]
        sides[-3] *= sides[-2] & sides[-1]  # where the mask is clipped, no kink matters
        spline(network.scaling.bind(), levels[:, None].expand(-1, len(t[0])))
        spline(prior.kappa.bind(), levels[:, None])
        for phi in (network.phi1, network.phi2):
            sides.append(phi.coefficients.diff() > 0)
        kernels = [k for k in prior.W.weight]
        kernels[0] = kernels[0] - kernels[0].mean((1, 2, 3), keepdim=True)
        impulse = type(prior.W.operator())(kernels).normal_kernel()
        row, column = divmod(
            int(torch.fft.rfft2(impulse, s=(279, 279)).abs().argmax()), 140
        )
        row = (
            min(row, 279 - row) if column == 0 else row
        )  # opposite frequencies are equal
        sides.append(torch.tensor([row, column]))
        return sides

    @torch.no_grad()
    def finite_difference(self, variable, direction, x_hat) -> float:
        """The central difference along a direction, in a step that crosses no kink."""
        size = float(variable.norm() / direction.norm())
        start = variable.clone()
        for eps in (3e-5, 1e-5, 3e-6, 1e-6, 3e-7):
            losses, sides = [], []
            for step in (eps, -eps):
                variable.copy_(start + step * size * direction)
                # To the rounding level: the difference amplifies errors by 1 / eps.
                x, info = self.solve(init=x_hat, rtol=4e-14)
                assert (info.residual <= 1e-14).all()
                losses.append(self.loss(x))
                sides.append(self.kinks(x, info))
            variable.copy_(start)
            if all(map(torch.equal, *sides)):
                return float(losses[0] - losses[1]) / (2 * eps * size)
        raise AssertionError("Every step crosses a kink: choose another problem.")


@pytest.mark.parametrize(
    ("physics", "batch"),
    [
        ("denoising", 1),
        ("denoising", 2),
        pytest.param("denoising", 3, marks=pytest.mark.slow),
        ("inpainting", 2),
        pytest.param("blur", 1, marks=pytest.mark.slow),
    ],
)
def test_exact_gradients_equal_finite_differences(physics, batch):
    problem = Problem(physics, batch)
    if (physics, batch) != ("denoising", 2):  # which takes all weights
        few = {"W.weight.0", "mask_network.V.1", *problem.inputs}
        problem.variables = {k: v for k, v in problem.variables.items() if k in few}
    x_hat, info = problem.solve()
    assert (info.residual <= 1e-12).all()
    assert info.mask.min() < 0.05 and info.mask.max() > 0.8 and info.mask.std() > 0.1
    names, variables = zip(*problem.variables.items(), strict=True)
    loss = problem.loss(x_hat)
    gradients = torch.autograd.grad(loss, variables, retain_graph=True)
    # Mean-reduced losses give tiny cotangents, at which solvers with an absolute
    # tolerance return wrong gradients.
    scaled = torch.autograd.grad(1e-8 * loss, variables)
    g = generator(9)
    for name, variable, gradient, tiny in zip(
        names, variables, gradients, scaled, strict=True
    ):
        assert relative_error(1e8 * tiny, gradient) < 1e-9, name
        # A random direction with some of the gradient, so that the derivative is not
        # small by chance.
        direction = torch.randn(variable.shape, generator=g, dtype=DOUBLE)
        direction = direction / direction.norm() + 0.5 * gradient / gradient.norm()
        expected = problem.finite_difference(variable, direction, x_hat.detach())
        got = float((gradient * direction).sum())
        assert got == pytest.approx(expected, rel=1e-6), name


def test_exact_gradients_differ_from_jacobian_free_ones():
    problem = Problem("inpainting", 2)
    variables = tuple(problem.variables.values())
    exact = torch.autograd.grad(problem.loss(problem.solve()[0]), variables)
    problem.model.adjoint = JACOBIAN_FREE
    free = torch.autograd.grad(problem.loss(problem.solve()[0]), variables)
    errors = [relative_error(f, e) for f, e in zip(free, exact, strict=True)]
    assert max(errors) > 1e-2


@pytest.mark.parametrize("physics", ["denoising", "inpainting", "blur"])
@pytest.mark.parametrize("batch", [1, 2])
def test_jacobian_free_gradients_are_those_of_one_step(physics, batch):
    problem = Problem(physics, batch)
    problem.model.adjoint = JACOBIAN_FREE
    x_hat, info = problem.solve()
    variables = tuple(problem.variables.values())
    gradients = torch.autograd.grad(problem.loss(x_hat), variables)

    # One step T(x) by a dense solve, differentiated by autograd; the image that the
    # mask is computed from is held fixed.
    prior, x = problem.model.prior, x_hat.detach()
    y, sigma = problem.inputs["y"], problem.inputs["sigma"]
    weight = problem.inputs.get("lambda_reg")
    if weight is None:
        weight = prior.default_lambda(sigma, x)
    mask = prior.mask(x, sigma)
    W = dense(prior.W, (1, HEIGHT, WIDTH))
    H, b = torch.eye(HEIGHT * WIDTH, dtype=DOUBLE), y
    if problem.physics is not None:
        A = dense(problem.physics.A, (1, HEIGHT, WIDTH))
        H, b = A.T @ A, problem.physics.A_adjoint(y)
    steps = []
    for i in range(batch):
        matrix = H + weight[i] * W.T @ (mask[i].flatten().square()[:, None] * W)
        steps.append(torch.linalg.solve(matrix, b[i].flatten()).view(1, HEIGHT, WIDTH))
    z = torch.stack(steps)
    assert relative_error(z, x) < 1e-11
    expected = torch.autograd.grad(problem.loss(z), variables)
    for name, got, want in zip(problem.variables, gradients, expected, strict=True):
        assert relative_error(got, want) < 1e-10, name


def test_two_forwards_before_one_backward_change_nothing():
    problem = Problem("denoising", 2)
    variables = tuple(problem.variables.values())
    expected = torch.autograd.grad(problem.loss(problem.solve()[0]), variables)
    loss = problem.loss(problem.solve()[0])
    problem.model(images(3, 1, 7, 7), sigma=0.2)  # another image, size and noise level
    gradients = torch.autograd.grad(loss, variables)
    for got, want in zip(gradients, expected, strict=True):
        assert torch.equal(got, want)


def test_gradients_of_a_batch_are_those_of_its_samples():
    prior = random_prior()
    model = random_model(prior, **EXACT)
    y, sigma = (
        images(3, 1, HEIGHT, WIDTH),
        torch.tensor([0.05, 0.08, 0.12], dtype=DOUBLE),
    )

    def gradients(rows):
        x_hat = model(y[rows], sigma=sigma[rows])
        loss = (x_hat - y[rows]).square().sum()
        return torch.autograd.grad(loss, list(prior.parameters()))

    singles = zip(*[gradients(slice(i, i + 1)) for i in range(3)], strict=True)
    for got, parts in zip(gradients(slice(3)), singles, strict=True):
        assert relative_error(got, sum(parts)) < 1e-9


@pytest.mark.parametrize("jacobian_free", [False, True])
def test_several_training_steps_lower_the_loss(jacobian_free):
    model = random_model(adjoint=AdjointOptions(jacobian_free), rtol=1e-6).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = images(2, 1, HEIGHT, WIDTH)
    y = x + 0.1 * torch.randn(x.shape, generator=generator(), dtype=DOUBLE)
    losses = []
    for _ in range(4):
        loss = (model(y, sigma=0.1) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


def test_backward_twice_needs_retain_graph_as_everywhere_in_torch():
    model = random_model()
    loss = model(images(1, 1, HEIGHT, WIDTH), sigma=0.1).sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    second = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(
        relative_error(b, 2 * a) < 1e-12 for a, b in zip(first, second, strict=True)
    )


def test_nothing_is_tracked_without_need():
    model = random_model().requires_grad_(False)
    assert not model(images(1, 1, HEIGHT, WIDTH), sigma=0.1).requires_grad
    model.requires_grad_()
    with torch.no_grad():
        assert not model(images(1, 1, HEIGHT, WIDTH), sigma=0.1).requires_grad


def test_loose_adjoint_warns():
    model = random_model(adjoint=AdjointOptions(rtol=1e-12, max_iter=1))
    loss = model(images(1, 1, HEIGHT, WIDTH), sigma=0.1).sum()
    with pytest.warns(
        ConvergenceWarning, match="adjoint system.*Gradients are inaccurate"
    ):
        loss.backward()
