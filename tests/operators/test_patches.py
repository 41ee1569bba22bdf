"""Patches as convolutions against explicit extraction, and the constraints."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import central_difference, dense_matrix, random
from torch.nn import functional as F

from deepinv_deal._batch import inner, norm
from deepinv_deal.operators import PatchConv, PatchDictionary
from deepinv_deal.operators.multi_conv import Convolution
from deepinv_deal.operators.patches import channel_map

BOUNDARIES = ("circular", "valid")
SIZES = [pytest.param(s, id="x".join(map(str, s))) for s in [(5, 5), (6, 9), (11, 8)]]


def extract(x, n, boundary):
    """All patches, shape (B, n * n, H', W'), by torch's own extraction."""
    if boundary == "circular":
        before, after = (n - 1) // 2, n // 2
        x = F.pad(x, (before, after, before, after), mode="circular")
    positions = (x.shape[-2] - n + 1, x.shape[-1] - n + 1)
    return F.unfold(x, n).unflatten(2, positions)


def dictionary(rng, num_atoms=9, n=4, num_free_atoms=3, boundary="circular"):
    """A random dictionary in float64."""
    D = PatchDictionary(num_atoms, n, num_free_atoms, boundary).double()
    with torch.no_grad():
        for weight in D.parameters():
            weight.copy_(random(rng, *weight.shape))
    return D


# -- patches as convolutions ---------------------------------------------------


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("seed", range(20))
def test_convolutions_equal_explicit_patches(seed, boundary):
    rng = torch.Generator().manual_seed(seed)
    n = 3 + seed % 3
    D = dictionary(rng, 5 + 3 * (seed % 3), n, seed % 4, boundary)
    frame = D.frame()
    W = PatchConv(frame.atoms, boundary)
    x = random(rng, 2, 1, n + seed % 7, n + 2 + seed % 5)
    patches = extract(x, n, boundary)
    rows = frame.atoms.flatten(1)
    with torch.no_grad():
        expected = channel_map(rows, patches)
        torch.testing.assert_close(W(x), expected, rtol=0, atol=1e-12)
        fast = frame.analysis(frame.features(x))  # D^T P x through the basis U
        torch.testing.assert_close(fast, expected, rtol=0, atol=1e-12)
        # sum_k ||E_k x - D a_k||^2 with the projector written out
        a = random(rng, *expected.shape)
        projected = patches - channel_map(frame.free.T @ frame.free, patches)
        expected = inner(*[projected - channel_map(rows.T, a)] * 2)
        actual = inner(*[frame.features(x) - frame.synthesis(a)] * 2)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [4, 5])
def test_adjoint_matches_in_inner_products(n, size, boundary, rng):
    for num_kernels in (3, 12):
        W = PatchConv(random(rng, num_kernels, n, n), boundary)
        x = random(rng, 3, 1, *size)
        Wx = W(x)
        z = random(rng, *Wx.shape)
        Wtz = W.adjoint(z)
        assert Wtz.shape == x.shape
        error = (inner(Wx, z) - inner(x, Wtz)).abs() / (norm(Wx) * norm(z))
        assert error.max() < 1e-12


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_synthesis_equals_folding_patches_back(boundary, rng):
    frame = dictionary(rng, boundary=boundary).frame()
    a = random(rng, 1, 9, 6, 7)
    with torch.no_grad():
        actual = frame.features.adjoint(frame.synthesis(a))
        patches = channel_map(frame.atoms.flatten(1).T, a).flatten(2)
        if boundary == "valid":
            expected = F.fold(patches, (9, 10), 4)
        else:
            padded = F.fold(patches, (9, 10), 4)
            expected = torch.zeros_like(actual)
            for i in range(9):
                for j in range(10):
                    target = (0, 0, (i - 1) % 6, (j - 1) % 7)
                    expected[target] += padded[0, 0, i, j]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 3), *((5, 5), (6, 9))], ids=str)
def test_spectrum_diagonalises_the_aggregation(size, rng):
    kernels, metric = random(rng, 6, 4, 4), random(rng, 6, 6)
    metric = metric @ metric.T
    W = PatchConv(kernels, "circular")
    spectrum = W.spectrum(*size, metric)
    assert spectrum.min() > 0
    if min(size) < 4:  # a patch wider than the image: repeat the image instead
        x = random(rng, 1, 1, *size).repeat(1, 1, 4, 4)
    else:
        x = random(rng, 2, 1, *size)
    expected = W.adjoint(channel_map(metric, W(x)))[..., : size[0], : size[1]]
    x = x[..., : size[0], : size[1]]
    actual = torch.fft.ifft2(spectrum * torch.fft.fft2(x)).real
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-11)


def test_aggregation_without_metric_is_the_normal_operator(rng):
    W = PatchConv(random(rng, 6, 3, 3), "circular")
    matrix = dense_matrix(lambda x: W.adjoint(W(x)), (1, 5, 4))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    spectrum = W.spectrum(5, 4).flatten().sort().values
    torch.testing.assert_close(spectrum, eigenvalues, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [(8, 9), (7, 8), (7, 9)], ids=str)
@pytest.mark.parametrize("channels", [2, 12], ids=["few", "many"])
def test_unpadded_convolution_equals_torch(channels, size, rng):
    kernel, x = random(rng, channels, 3, 4, 4), random(rng, 2, 3, *size)
    torch.testing.assert_close(
        Convolution(kernel, pad=0)(x), F.conv2d(x, kernel), rtol=0, atol=1e-12
    )


# -- constraints ---------------------------------------------------------------


@pytest.mark.parametrize("num_free_atoms", [0, 5])
def test_constraints_hold_for_any_weights(num_free_atoms, rng):
    frame = dictionary(rng, 12, 5, num_free_atoms).frame()
    with torch.no_grad():
        atoms, free = frame.atoms.flatten(1), frame.free
        U = frame.features.kernels.flatten(1)
        eye = torch.eye(25, dtype=torch.float64)
        torch.testing.assert_close(
            free @ free.T, eye[: 1 + num_free_atoms, : len(free)]
        )
        torch.testing.assert_close(U.T @ U + free.T @ free, eye)
        torch.testing.assert_close(free[0], torch.full_like(free[0], 1 / 5))
        assert (atoms @ free.T).abs().max() < 1e-13
        norms = torch.linalg.vector_norm(atoms, dim=1)
        torch.testing.assert_close(norms, norms[:1].expand(12))
        torch.testing.assert_close(float(torch.linalg.matrix_norm(atoms, 2)), 1.0)


def test_constraints_hold_after_an_optimizer_step(rng):
    D = dictionary(rng)
    optimizer = torch.optim.Adam(D.parameters(), lr=0.5)
    x = random(rng, 2, 1, 6, 6)
    before = D.frame().atoms.detach()
    D.frame().analysis(D.frame().features(x)).abs().sum().backward()
    optimizer.step()
    with torch.no_grad():
        frame = D.frame()
        atoms = frame.atoms.flatten(1)
        assert (atoms - before.flatten(1)).abs().max() > 1e-3
        assert (atoms @ frame.free.T).abs().max() < 1e-13
        torch.testing.assert_close(float(torch.linalg.matrix_norm(atoms, 2)), 1.0)


def test_gradients_through_the_constraints_equal_finite_differences(rng):
    D = dictionary(rng)
    x, target = random(rng, 2, 1, 6, 6), random(rng, 2, 9, 6, 6)

    def loss(frame):
        # Both ways in which the basis enters: projected patches and coefficients.
        f = frame.features(x) - frame.synthesis(target)
        return inner(f, f).sum() + (frame.analysis(f) * target.sin()).sum()

    gradients = torch.autograd.grad(loss(D.frame()), list(D.parameters()))
    for weight, gradient in zip(D.parameters(), gradients, strict=True):
        direction = random(rng, *weight.shape)

        def along(value, weight=weight):
            with torch.no_grad():
                saved = weight.clone()
                weight.copy_(value)
                result = loss(D.frame())
                weight.copy_(saved)
            return result

        expected = central_difference(along, weight.detach().clone(), direction)
        torch.testing.assert_close(
            (gradient * direction).sum(), expected, rtol=1e-6, atol=1e-6
        )


def test_dictionaries_can_be_pickled_copied_and_stored(rng):
    D = dictionary(rng)
    expected = D.frame().atoms
    for other in (pickle.loads(pickle.dumps(D)), copy.deepcopy(D)):
        torch.testing.assert_close(other.frame().atoms, expected)
    other = dictionary(rng)
    other.load_state_dict(D.state_dict())
    torch.testing.assert_close(other.frame().atoms, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boundary": "zero"}, "boundary must be one of"),
        ({"num_free_atoms": 8}, r"patch_size\*\*2 - 2 = 7"),
        ({"num_atoms": 0}, "num_atoms must be positive"),
    ],
    ids=str,
)
def test_bad_dictionaries_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchDictionary(**{"num_atoms": 4, "patch_size": 3, **arguments})


@pytest.mark.parametrize("num_free_atoms", [0, 3])
def test_projection_keeps_the_dictionary(rng, num_free_atoms):
    D = dictionary(rng, num_free_atoms=num_free_atoms)
    before = D.frame()
    D.project_()
    after = D.frame()
    torch.testing.assert_close(after.atoms, before.atoms, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.free, before.free, rtol=0, atol=1e-12)
    parameters = [p.clone() for p in D.parameters()]
    D.project_()  # what is projected stays
    for new, old in zip(D.parameters(), parameters, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12)
