"""Arithmetic on batches."""

import pytest
import torch
from problems import generator

from deepinv_deal import _batch
from deepinv_deal._batch import distance, expand, in_parts

SHAPE = (2, 3, 5, 7)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(_batch, "PART", 8 // torch.get_num_threads() or 1)


def numbers(*shape, seed=0, layout=torch.contiguous_format):
    x = torch.randn(shape, generator=generator(seed))
    return x.contiguous(memory_format=layout) if x.ndim == 4 else x


@pytest.mark.parametrize(
    "layouts",
    [
        (torch.contiguous_format,) * 2,
        (torch.channels_last,) * 2,
        (torch.channels_last, torch.contiguous_format),
    ],
    ids=["contiguous", "channels last", "mixed"],
)
def test_parts_make_up_the_whole(layouts):
    a, b = (numbers(*SHAPE, seed=i, layout=m) for i, m in enumerate(layouts))
    scale, sizes = torch.tensor([2.0, 3.0]), []

    def function(a, b):
        sizes.append(a.numel())
        return expand(scale, a) * a + b

    with torch.no_grad():
        out = in_parts(function, a, b)
    assert torch.equal(out, scale[:, None, None, None] * a + b)
    assert out.stride() == (a + b).stride()
    assert (max(sizes) <= 8) == (layouts[0] == layouts[1])


@pytest.mark.parametrize("shape", [(1, 40), (3, 9, 2), (20, 1)])
def test_parts_of_any_shape(shape):
    with torch.no_grad():
        out = in_parts(lambda x: x > 0, numbers(*shape))
    assert out.dtype == torch.bool and torch.equal(out, numbers(*shape) > 0)


def test_views_are_not_taken_for_what_they_show():
    x = numbers(2, 8, 5, 5)[:, 3:6]
    with torch.no_grad():
        assert torch.equal(in_parts(torch.neg, x), -x)


def test_gradients_pass_through():
    x = numbers(*SHAPE).requires_grad_()
    in_parts(torch.square, x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_tensors_of_other_shapes_are_broadcast_whatever_the_size():
    a, b = numbers(2, 3, 4, 5), numbers(2, 1, 1, 1, seed=1)
    with torch.no_grad():
        assert torch.equal(in_parts(torch.add, a, b), a + b)
        for function in (lambda a, b: in_parts(torch.add, a, b), distance):
            with pytest.raises(RuntimeError):
                function(a, numbers(2, 5, 4, 3))


def test_functions_may_return_several_tensors():
    a, b = numbers(*SHAPE), numbers(*SHAPE, seed=1)
    with torch.no_grad():
        total, product = in_parts(lambda a, b: (a + b, a * b), a, b)
    assert torch.equal(total, a + b) and torch.equal(product, a * b)


@pytest.mark.parametrize(
    "layouts",
    [(torch.channels_last,) * 2, (torch.channels_last, torch.contiguous_format)],
    ids=["in parts", "at once"],
)
def test_distances_are_those_of_samples(layouts):
    a, b = (numbers(*SHAPE, seed=i, layout=m) for i, m in enumerate(layouts))
    with torch.no_grad():
        found = distance(a, b)
    torch.testing.assert_close(found, (a - b).flatten(1).norm(dim=1))
