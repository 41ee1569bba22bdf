"""The multi-convolution against plain convolutions and dense matrices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from deepinv.models.deal import MultiConv2d
from helpers import central_difference, dense_matrix, random
from torch.nn import functional as F

from deepinv_deal._batch import inner, norm
from deepinv_deal.operators import MultiConv, MultiConvOperator
from deepinv_deal.operators.multi_conv import (
    BlockConvolution,
    BlockedNormal,
    CollapsedOperator,
    Convolution,
    to_blocks,
)

GRAY, COLOUR = (
    (1, 2, 3, 10),
    (3, 4, 9, 6),
)  # layers with at most and more than 8 channels
CHANNELS = [pytest.param(GRAY, id="gray"), pytest.param(COLOUR, id="colour")]
SIZES = [
    pytest.param(size, id="x".join(map(str, size)))
    for size in [(1, 1), (1, 6), (2, 2), (3, 4), (6, 6), (7, 7), (8, 5), (5, 12)]
]


def multi_conv(rng, channels, kernel_size=5, **options) -> MultiConv:
    """A multi-convolution in float64 with random weights."""
    W = MultiConv(channels, kernel_size, **options).double()
    with torch.no_grad():
        for weight in W.weight:
            weight.copy_(random(rng, *weight.shape) / weight[0].numel() ** 0.5)
    return W


def plain_kernels(W: MultiConv) -> list[torch.Tensor]:
    first, *others = [weight.detach() for weight in W.weight]
    return [first - first.mean((1, 2, 3), keepdim=True), *others]


def plain_chain(kernels, x, pad=None):
    """Convolutions one after the other; ``pad`` extends the image, default zeros."""
    for kernel in kernels:
        width = kernel.shape[-1] // 2
        if pad is None:
            x = F.conv2d(x, kernel, padding=width)
        else:
            x = F.conv2d(F.pad(x, (width,) * 4, mode=pad), kernel)
    return x


def plain_adjoint(kernels, z):
    for kernel in reversed(kernels):
        z = F.conv_transpose2d(z, kernel, padding=kernel.shape[-1] // 2)
    return z


@pytest.mark.parametrize("kind", [MultiConvOperator, CollapsedOperator])
def test_another_precision_is_the_same_operator_but_for_rounding(rng, kind):
    kernels = multi_conv(rng, (1, 4, 6)).kernels()
    W = kind([kernel.detach() for kernel in kernels])
    rounded = W.to(torch.float16)
    assert {kernel.dtype for kernel in W.kernels} == {torch.float64}
    assert {kernel.dtype for kernel in rounded.kernels} == {torch.float16}
    assert type(rounded) is kind
    x, z = random(rng, 2, 1, 9, 11), random(rng, 2, 6, 9, 11)
    for exact, found in [
        (W(x), rounded(x.half())),
        (W.adjoint(z), rounded.adjoint(z.half())),
    ]:
        assert found.dtype == torch.float16
        error = norm(found.double() - exact) / norm(exact)
        assert (1e-5 < error).all() and (error < 4e-3).all()


# -- layers merged into one kernel ---------------------------------------------

MERGED = (1, 20, 20)  # 20 channels in between: one 9x9 kernel is cheaper


@pytest.mark.parametrize("channels", [MERGED, (3, 40, 40)], ids=["gray", "colour"])
@pytest.mark.parametrize(
    "size",
    [(40, 31), (5, 4), (3, 30), (2, 2), (9, 1)],
    ids=lambda size: "x".join(map(str, size)),
)
def test_merged_layers_give_the_same_map_and_adjoint(channels, size, rng):
    W = multi_conv(rng, channels, normalization="none")
    merged, layered = W.operator(), MultiConvOperator(W._zero_mean_kernels())
    assert isinstance(merged, CollapsedOperator)
    x, z = random(rng, 2, channels[0], *size), random(rng, 2, channels[2], *size)
    torch.testing.assert_close(merged(x), layered(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        merged.adjoint(z), layered.adjoint(z), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(merged.normal(x), layered.normal(x), rtol=0, atol=1e-11)
    torch.testing.assert_close(merged.normal_kernel(), layered.normal_kernel())


def test_layers_are_merged_only_where_that_is_cheaper(rng):
    for channels in (GRAY, COLOUR):
        assert not isinstance(multi_conv(rng, channels).operator(), CollapsedOperator)
    assert not isinstance(multi_conv(rng, MERGED, 1).operator(), CollapsedOperator)
    three = multi_conv(rng, (1, 20, 20, 20)).operator()
    assert not isinstance(three, CollapsedOperator)


@pytest.mark.parametrize("size", [(13, 14), (3, 9)], ids=["large", "small"])
def test_gradients_flow_through_merged_layers(size, rng):
    W = multi_conv(rng, MERGED, normalization="none")
    x, z = random(rng, 1, 1, *size).requires_grad_(), random(rng, 1, 20, *size)
    gradients = []
    for make in (W.operator, lambda: MultiConvOperator(W._zero_mean_kernels())):
        value = inner(make()(x), z).sum() + inner(x, make().adjoint(z)).sum()
        gradients.append(torch.autograd.grad(value, (x, *W.weight)))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_a_large_kernel_to_one_channel_is_applied_row_by_row(rng):
    kernel, x = random(rng, 1, 16, 9, 9), random(rng, 2, 16, 11, 6)
    convolution = Convolution(kernel)
    assert convolution.by_rows
    expected = F.conv2d(x, kernel, padding=4)
    torch.testing.assert_close(convolution(x), expected, rtol=0, atol=1e-12)


# -- settings of the SAFI type -------------------------------------------------


def test_every_kernel_may_have_zero_mean(rng):
    W = multi_conv(rng, (1, 3, 4), zero_mean="every", normalization="none")
    for kernel in W._zero_mean_kernels():
        assert kernel.mean((2, 3)).abs().max() < 1e-14
    ramp = torch.linspace(0, 1, 30, dtype=torch.float64).expand(1, 1, 30, 30)
    response = W(ramp + 2 * ramp.mT)
    inside = slice(W.operator().reach, -W.operator().reach)
    assert response[..., inside, inside].abs().max() < 1e-12 * response.abs().max()


def test_the_operator_may_be_divided_by_a_number(rng):
    W = multi_conv(rng, GRAY)
    x = random(rng, 1, 1, 9, 9)
    half = W.operator(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(2 * half(x), W(x))


# -- the map and its adjoint ---------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_adjoint_matches_in_inner_products(channels, size, rng):
    W = multi_conv(rng, channels, normalization="none").operator()
    x = random(rng, 20, channels[0], *size)
    z = random(rng, 20, channels[-1], *size)
    with torch.no_grad():
        Wx, Wtz = W(x), W.adjoint(z)
    assert Wx.shape == z.shape and Wtz.shape == x.shape
    error = (inner(Wx, z) - inner(x, Wtz)).abs() / (norm(Wx) * norm(z))
    assert error.max() < 1e-12


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 9])
@pytest.mark.parametrize("size", SIZES)
def test_equals_plain_zero_padded_convolutions(size, kernel_size, rng):
    for channels in (GRAY, COLOUR):
        W = multi_conv(rng, channels, kernel_size, normalization="none")
        x = random(rng, 2, channels[0], *size)
        z = random(rng, 2, channels[-1], *size)
        with torch.no_grad():
            expected = plain_chain(plain_kernels(W), x)
            torch.testing.assert_close(W(x), expected, rtol=1e-12, atol=1e-12)
            expected = plain_adjoint(plain_kernels(W), z)
            torch.testing.assert_close(W.adjoint(z), expected, rtol=1e-12, atol=1e-12)


def test_memory_layout_of_the_input_does_not_matter(rng):
    W = multi_conv(rng, COLOUR, normalization="none").operator()
    x = random(rng, 2, 3, 7, 6)
    channels_last = x.to(memory_format=torch.channels_last)
    strided = random(rng, 2, 3, 6, 7).copy_(x.mT).mT
    with torch.no_grad():
        torch.testing.assert_close(W(channels_last), W(x), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(W(strided), W(x), rtol=1e-13, atol=1e-13)


def test_float32_agrees_with_float64(rng):
    W = multi_conv(rng, GRAY)
    x = random(rng, 2, 1, 9, 8)
    with torch.no_grad():
        expected = W(x)
        actual = W.float()(x.float())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", CHANNELS)
def test_vjp_of_the_map_is_its_adjoint_and_conversely(channels, rng):
    W = multi_conv(rng, channels, normalization="none").operator()
    x = random(rng, 2, channels[0], 6, 7).requires_grad_()
    z = random(rng, 2, channels[-1], 6, 7).requires_grad_()
    (vjp,) = torch.autograd.grad(W(x), x, z)
    torch.testing.assert_close(vjp, W.adjoint(z), rtol=1e-12, atol=1e-12)
    (vjp,) = torch.autograd.grad(W.adjoint(z), z, x)
    torch.testing.assert_close(vjp, W(x), rtol=1e-12, atol=1e-12)


def test_module_and_operator_agree(rng):
    W = multi_conv(rng, GRAY, 3)
    x, z = random(rng, 1, 1, 5, 6), random(rng, 1, 10, 5, 6)
    with torch.no_grad():
        operator = W.operator()
        torch.testing.assert_close(W(x), operator(x))
        torch.testing.assert_close(W.adjoint(z), operator.adjoint(z))


def test_operator_follows_the_weights_only_when_taken_again(rng):
    W = multi_conv(rng, GRAY, 3)
    x = random(rng, 1, 1, 5, 6)
    with torch.no_grad():
        operator = W.operator()
        before = operator(x)
        W.weight[1].add_(random(rng, *W.weight[1].shape))
        torch.testing.assert_close(operator(x), before)
        assert (W(x) - before).abs().max() > 1e-2


def test_reach_bounds_the_influence_of_a_pixel(rng):
    W = multi_conv(rng, GRAY, 3, zero_mean=False, normalization="none").operator()
    x = torch.zeros(1, 1, 11, 11, dtype=torch.float64)
    x[..., 5, 5] = 1
    with torch.no_grad():
        rows = W(x).abs().amax((0, 1, 3)) > 0
    assert W.reach == 3
    assert rows.tolist() == [abs(i - 5) <= 3 for i in range(11)]


# -- zero mean -----------------------------------------------------------------


@pytest.mark.parametrize("channels", CHANNELS)
def test_constants_are_annihilated_away_from_the_border(channels, rng):
    x = torch.ones(1, channels[0], 16, 15, dtype=torch.float64)
    W = multi_conv(rng, channels, 3)
    reach = W.operator().reach
    inside = (..., slice(reach, -reach), slice(reach, -reach))
    with torch.no_grad():
        assert W(x)[inside].abs().max() < 1e-13
        W.zero_mean = False
        assert W(x)[inside].abs().max() > 1e-3


def test_zero_mean_survives_an_optimizer_step(rng):
    W = multi_conv(rng, GRAY, 3, normalization="none")
    optimizer = torch.optim.SGD(W.parameters(), lr=1.0)
    W(random(rng, 1, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        response = W(torch.ones(1, 1, 9, 9, dtype=torch.float64))
    assert response[..., 4, 4].abs().max() < 1e-11 * response.abs().max()


# -- norm ----------------------------------------------------------------------


def published_sqnorm(kernels) -> torch.Tensor:
    """The rule of the docstring, written with plain convolutions."""
    channels = kernels[0].shape[1]
    reach = sum(kernel.shape[-1] // 2 for kernel in kernels)
    dirac = kernels[0].new_zeros(1, channels, 4 * reach + 1, 4 * reach + 1)
    dirac[0, channels // 2, 2 * reach, 2 * reach] = 1
    kernel = plain_adjoint(kernels, plain_chain(kernels, dirac))
    spectrum = torch.fft.fft2(F.pad(kernel, ((256 - 1) // 2 - reach,) * 4)).abs()
    return sum(spectrum[0, c].max() for c in range(channels))


@pytest.mark.parametrize("kernel_size", [3, 9])
@pytest.mark.parametrize("channels", CHANNELS)
def test_published_norm_follows_the_stated_rule(channels, kernel_size, rng):
    W = multi_conv(rng, channels, kernel_size)
    with torch.no_grad():
        actual, expected = W.sqnorm(), published_sqnorm(plain_kernels(W))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        x = random(rng, 1, channels[0], 6, 7)
        plain = plain_chain(plain_kernels(W), x) / expected.sqrt()
        torch.testing.assert_close(W(x), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "channels",
    [pytest.param((1, 4, 8, 16), id="gray"), pytest.param((3, 4, 5), id="RGB")],
)
def test_published_norm_is_that_of_deepinv(channels, rng):
    n_layers, color = len(channels) - 1, channels[0] == 3
    theirs = MultiConv2d(list(channels), [9] * n_layers, color=color)
    ours = MultiConv(channels)
    x = random(rng, 1, channels[0], 10, 11, dtype=torch.float32)
    with torch.no_grad():
        for weight, layer in zip(ours.weight, theirs.conv_layers, strict=True):
            weight.copy_(layer.weight)
        expected = theirs.spectral_norm()
        torch.testing.assert_close(ours.sqnorm(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-6)


def circular_sqnorm(W: MultiConv, size: int) -> torch.Tensor:
    """The squared norm of the circular convolutions on a torus, from a dense matrix."""
    kernels = plain_kernels(W)
    matrix = dense_matrix(
        lambda x: plain_chain(kernels, x, pad="circular"), (W.channels[0], size, size)
    )
    return torch.linalg.matrix_norm(matrix, 2) ** 2


TORUS_CHANNELS = [
    pytest.param((1, 2, 3), id="gray"),
    pytest.param((2, 2, 3), id="two-channels"),
    pytest.param((3, 4, 3), id="colour"),
]


@pytest.mark.parametrize("channels", TORUS_CHANNELS)
def test_exact_norm_equals_a_dense_decomposition_on_a_torus(channels, rng):
    W = multi_conv(rng, channels, 3, normalization="exact")
    sign = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]], dtype=torch.float64)
    with torch.no_grad():
        for (
            weight
        ) in W.weight:  # strongest at the highest frequency, part of any even DFT
            mixing = random(rng, *weight.shape[:2])[..., None, None]
            weight.copy_(mixing * sign + 0.1 * random(rng, *weight.shape))
        expected = circular_sqnorm(W, 8)
        torch.testing.assert_close(W.sqnorm(), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("channels", TORUS_CHANNELS)
def test_exact_norm_bounds_every_torus_and_tightly(channels, rng):
    W = multi_conv(rng, channels, 3)
    with torch.no_grad():
        exact, torus = W.sqnorm("exact"), circular_sqnorm(W, 16)
    assert torus * (1 - 1e-12) <= exact <= 1.02 * torus


def test_published_rule_overestimates_colour(rng):
    W = multi_conv(rng, (3, 4, 5), 3)
    with torch.no_grad():
        assert W.sqnorm("published") > 1.1 * W.sqnorm("exact")


def test_each_normalization_gives_another_operator(rng):
    W = multi_conv(rng, (2, 3, 4), 3)
    x = random(rng, 1, 2, 6, 6)
    plain = plain_chain(plain_kernels(W), x)
    outputs = []
    with torch.no_grad():
        for name in ("published", "exact", "none"):
            W.normalization = name
            outputs.append(W(x))
            expected = plain / W.sqnorm().sqrt()
            torch.testing.assert_close(outputs[-1], expected, rtol=1e-12, atol=1e-12)
        assert W.sqnorm() == 1
    assert len({round(norm(output).item(), 6) for output in outputs}) == 3


@pytest.mark.parametrize("channels", CHANNELS)
def test_normal_kernel_holds_the_responses_to_diracs(channels, rng):
    W = multi_conv(rng, channels, 3, normalization="none").operator()
    with torch.no_grad():
        kernel = W.normal_kernel()
        n = kernel.shape[-1]
        assert kernel.shape == (channels[0], channels[0], n, n) and n == 4 * W.reach + 1
        x = torch.zeros(1, channels[0], n + 4, n + 4, dtype=torch.float64)
        x[0, -1, n // 2 + 2, n // 2 + 2] = 1
        response = W.adjoint(W(x))[0, :, 2:-2, 2:-2]
    torch.testing.assert_close(kernel[-1], response, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("channels", CHANNELS)
def test_correlations_are_the_normal_kernels_of_single_filters(channels, rng):
    W = multi_conv(rng, channels, 3, normalization="none").operator()
    with torch.no_grad():
        found = W.correlations()
        torch.testing.assert_close(found.sum(2).transpose(0, 1), W.normal_kernel())
        responses = W.impulse_responses()
        alone = torch.zeros_like(responses)
        alone[:, 1] = responses[:, 1]
        torch.testing.assert_close(found[:, :, 1].transpose(0, 1), W.adjoint(alone))


@pytest.mark.parametrize(
    "channels, normalization",
    [
        ((1, 2, 2), "published"),
        ((1, 2, 2), "exact"),
        ((1, 2, 2), "none"),
        ((3, 2, 2), "published"),
        ((2, 2), "exact"),
    ],
)
def test_gradients_of_the_weights_are_finite_differences(channels, normalization, rng):
    W = multi_conv(rng, channels, 3, normalization=normalization)
    x, z = random(rng, 1, channels[0], 4, 5), random(rng, 1, 2, 4, 5)
    loss = (W(x) * z).sum()
    loss.backward()
    for i, weight in enumerate(W.weight):
        direction = random(rng, *weight.shape)

        def function(values, i=i):
            shadow = copy.deepcopy(W)
            shadow.weight[i].copy_(values)
            return (shadow(x) * z).sum()

        expected = central_difference(function, weight.detach(), direction)
        actual = (weight.grad * direction).sum()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


# -- the module ----------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda W: pickle.loads(pickle.dumps(W)), id="pickle"),
    ],
)
def test_copies_give_the_same_map(duplicate, rng):
    W = multi_conv(rng, GRAY, 3)
    twin, x = duplicate(W), random(rng, 1, 1, 6, 5)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), W(x), rtol=0, atol=0)
        twin.weight[0].zero_()
        assert W(x).abs().max() > 0


def test_state_dict_holds_the_raw_weights_only(rng):
    W, twin = multi_conv(rng, GRAY, 3), multi_conv(rng, GRAY, 3)
    assert list(W.state_dict()) == ["weight.0", "weight.1", "weight.2"]
    twin.load_state_dict(W.state_dict())
    x = random(rng, 1, 1, 6, 5)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), W(x), rtol=0, atol=0)


def test_representation_names_the_settings():
    text = repr(MultiConv((1, 2), 3, normalization="exact", zero_mean=False))
    for part in ("(1, 2)", "kernel_size=3", "'exact'", "zero_mean=False"):
        assert part in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(
            dict(channels=(1, 2), kernel_size=4), "odd and positive", id="even"
        ),
        pytest.param(
            dict(channels=(1, 2), kernel_size=0), "odd and positive", id="zero"
        ),
        pytest.param(dict(channels=(1, 2), kernel_size=-3), "odd and", id="negative"),
        pytest.param(dict(channels=(1,)), "input and output", id="one-entry"),
        pytest.param(dict(channels=()), "input and output", id="empty"),
        pytest.param(
            dict(channels=(1, 2), normalization="spectral"), "'spectral'", id="name"
        ),
        pytest.param(dict(channels=(1, 2), zero_mean="all"), "'all'", id="mean"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiConv(**arguments)


def test_an_unknown_norm_rule_is_refused():
    with pytest.raises(ValueError, match="'extact'"):
        MultiConv((1, 2), 3).sqnorm("extact")


def test_an_operator_can_be_made_from_given_kernels(rng):
    kernels = [random(rng, 4, 2, 3, 3), random(rng, 9, 4, 5, 5)]
    W, x = MultiConvOperator(kernels), random(rng, 1, 2, 6, 7)
    assert W.in_channels == 2 and W.reach == 3
    torch.testing.assert_close(W(x), plain_chain(kernels, x), rtol=1e-12, atol=1e-12)


# -- blocks of pixels, for accelerators ------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 12), (17, 15), (9, 22)])
def test_the_normal_operator_in_blocks_of_pixels_is_the_same(channels, size):
    W = MultiConv((channels, 2, 3, 5), 9).double()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *size, generator=rng, dtype=torch.float64)
    squared_mask = torch.rand(2, 5, *size, generator=rng, dtype=torch.float64)
    results = []
    for blocked in (False, True):
        operator = W.operator()
        kernels = list(W.parameters())
        x_ = x.clone().requires_grad_()
        m = squared_mask.clone().requires_grad_()
        if blocked:
            normal = BlockedNormal(operator.kernels)
            out = normal(x_, to_blocks(m))
        else:
            out = operator.adjoint(m * operator(x_))
        gradients = torch.autograd.grad(out.square().sum(), [x_, m, *kernels])
        results.append([out, *gradients])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-10)


def test_blocks_of_pixels_are_for_large_kernels_on_accelerators():
    kernel = torch.zeros(2, 1, 9, 9)
    assert not BlockedNormal.pays([kernel])
    assert BlockedNormal.pays([kernel.to("meta")])
    assert not BlockedNormal.pays([kernel[..., :3, :3].to("meta")])


@pytest.mark.parametrize("shape", [(4, 1, 9), (5, 3, 7), (2, 6, 13)])
@pytest.mark.parametrize("size", [(16, 12), (17, 15), (5, 6)])
def test_one_convolution_in_blocks_of_pixels_is_the_same(shape, size, rng, monkeypatch):
    c_out, c_in, k = shape
    kernel = torch.randn(c_out, c_in, k, k, generator=rng, dtype=torch.float64)
    x = torch.randn(2, c_in, *size, generator=rng, dtype=torch.float64)
    results = []
    for blocks in (False, True):
        monkeypatch.setattr(BlockConvolution, "pays", lambda _, b=blocks: b)
        inputs = [t.clone().requires_grad_() for t in (kernel, x)]
        convolution = Convolution(inputs[0])
        assert (convolution.blocks is not None) == blocks
        out = convolution(inputs[1])
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-10)


def test_single_convolutions_are_in_blocks_where_channels_are_few():
    kernel = torch.zeros(128, 8, 9, 9)
    assert Convolution(kernel).blocks is None
    assert Convolution(kernel.to("meta")).blocks is not None
    assert Convolution(kernel.to("meta"), pad=0).blocks is None
    assert Convolution(torch.zeros(48, 48, 7, 7, device="meta")).blocks is None
