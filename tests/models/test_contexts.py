"""Every model where torch users put it: autocast, checkpointing, copies, loops."""

from __future__ import annotations

import copy
import gc
import pickle
import resource

import pytest
import torch
from problems import EACH_MODEL, MODELS, images
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

SHAPE = (2, 1, 5, 6)


def differentiate(x_hat, y, weights):
    """The image, and the gradients of a loss in the image given and the weights."""
    loss = x_hat.square().sum()
    found = torch.autograd.grad(loss, [y, *weights], allow_unused=True)
    return [x_hat.detach(), *(g for g in found if g is not None)]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def answer(model, call=None, dtype=torch.float64):
    y = images(*SHAPE, dtype=dtype).requires_grad_()
    return differentiate((call or model)(y, sigma=0.1), y, trainable(model))


def assert_equal(actual, expected):
    """The same numbers, bit by bit."""
    assert len(actual) == len(expected) > 2
    assert all(map(torch.equal, actual, expected))


def changed(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    return model


@pytest.fixture(scope="module", params=EACH_MODEL)
def case(request):
    """A function that makes the model, the model after use, and its answer."""
    make = MODELS[request.param]
    model = make()
    return make, model, answer(model)


def test_repetitions_are_equal_bit_by_bit(case):
    _, model, expected = case
    assert_equal(answer(model), expected)


def test_gradient_checkpointing_changes_nothing(case):
    _, model, expected = case

    def call(y, sigma):
        return checkpoint(model, y, sigma=sigma, use_reentrant=False)

    assert_equal(answer(model, call), expected)


def test_functional_calls_use_the_weights_given(case):
    make, model, expected = case
    other, y = changed(make()), images(*SHAPE).requires_grad_()
    weights = {
        name: p.detach().clone().requires_grad_(p.requires_grad)
        for name, p in model.named_parameters()
    }
    x_hat = functional_call(other, weights, (y,), {"sigma": 0.1})
    leaves = [w for w in weights.values() if w.requires_grad]
    assert_equal(differentiate(x_hat, y, leaves), expected)
    with torch.no_grad():
        assert not torch.equal(other(y, sigma=0.1), expected[0])


def test_copies_made_after_a_backward_pass_are_equal(case):
    make, model, expected = case
    assert_equal(answer(copy.deepcopy(model)), expected)
    other = changed(make())
    other.load_state_dict(model.state_dict())
    for copied in (other, pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(images(*SHAPE), sigma=0.1), expected[0])


@pytest.mark.parametrize("name", EACH_MODEL)
def test_autocast_does_not_reach_the_solvers(name):
    model = MODELS[name]().float()
    y = images(*SHAPE, dtype=torch.float32).requires_grad_()
    expected = answer(model, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hat = model(y, sigma=0.1)
    assert_equal(differentiate(x_hat, y, trainable(model)), expected)
    # Torch lowers a backward pass inside the region, but not the adjoint solve: it
    # converges, or the warning would be an error.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = answer(model, dtype=torch.float32)
    assert torch.equal(inside[0], expected[0])


def test_calls_keep_no_tensors(case):
    _, model, _ = case
    numbers = []
    for _ in range(2):
        answer(model)
        gc.collect()
        kinds = map(type, gc.get_objects())
        numbers.append(sum(issubclass(kind, torch.Tensor) for kind in kinds))
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_two_hundred_calls_do_not_raise_the_peak_of_the_memory(case):
    _, model, _ = case
    peaks = []
    for calls in (30, 200):
        for _ in range(calls):
            answer(model)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # kB
    # The allocator takes a few MB more or less; 200 graphs would be far more.
    assert peaks[1] - peaks[0] < 10_000
