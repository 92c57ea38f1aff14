"""Optimizers, compared with torch's own (minimizing the negative), and ClipUp with its formulas."""

import copy
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from es_flipout.strategy.optimizers import ClipUp, make_optimizer

NAMES: tuple[Literal["adam", "sgd", "clipup"], ...] = ("adam", "sgd", "clipup")
SHAPES = ((3, 2), (3,), (1, 3))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def gradients(steps: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES] for _ in range(steps)]


def walk(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: list[list[Tensor]], sign: int) -> None:
    for step in steps:
        for parameter, gradient in zip(params, step, strict=True):
            parameter.grad = sign * gradient
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_adam_and_sgd_are_torchs_going_uphill(name: Literal["adam", "sgd"], momentum: float) -> None:
    ours, theirs = parameters(), parameters()
    walk(make_optimizer(name, ours, 0.05, momentum), ours, gradients(12), sign=1)
    reference = (
        torch.optim.Adam(theirs, lr=0.05, betas=(momentum, 0.999))
        if name == "adam"
        else torch.optim.SGD(theirs, lr=0.05, momentum=momentum)
    )
    walk(reference, theirs, gradients(12), sign=-1)
    for mine, reference_parameter in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference_parameter, rtol=1e-6, atol=1e-7)


def clipup_path(
    start: NDArray[np.float64], steps: list[NDArray[np.float64]], lr: float, momentum: float, max_speed: float
) -> NDArray[np.float64]:
    """Run algorithm 1 of the ClipUp paper, with all parameters in one vector."""
    x, velocity = start, np.zeros_like(start)
    for gradient in steps:
        velocity = momentum * velocity + lr * gradient / np.linalg.norm(gradient)
        speed = np.linalg.norm(velocity)
        if speed > max_speed:
            velocity = max_speed * velocity / speed
        x = x + velocity
    return x


def flat(tensors: list[Tensor] | list[nn.Parameter]) -> NDArray[np.float64]:
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in tensors])


@settings(max_examples=20)
@given(
    lr=st.floats(1e-3, 1.0),
    momentum=st.floats(0, 0.99),
    ratio=st.one_of(st.none(), st.floats(0.2, 10.0)),
    scale=st.floats(1e-20, 1e20),
)
def test_clipup_follows_its_formulas(lr: float, momentum: float, ratio: float | None, scale: float) -> None:
    params = parameters(torch.float64)
    steps = [[scale * gradient for gradient in step] for step in gradients(10, torch.float64)]
    max_speed = None if ratio is None else ratio * lr
    expected = clipup_path(
        flat(params), [flat(step) for step in steps], lr, momentum, 2 * lr if max_speed is None else max_speed
    )
    walk(ClipUp(params, lr, momentum, max_speed), params, steps, sign=1)
    np.testing.assert_allclose(flat(params), expected, rtol=1e-10, atol=1e-12)


def test_clipup_first_step_has_length_lr_over_all_parameters_together() -> None:
    params = parameters(torch.float64)
    before = flat(params)
    step = gradients(1, torch.float64)
    walk(make_optimizer("clipup", params, 0.3), params, step, sign=1)
    moved = flat(params) - before
    assert np.linalg.norm(moved) == pytest.approx(0.3, rel=1e-12)
    np.testing.assert_allclose(moved, 0.3 * flat(step[0]) / np.linalg.norm(flat(step[0])), rtol=1e-12)


def test_clipup_speed_limit_is_twice_the_step_by_default() -> None:
    params = parameters(torch.float64)
    optimizer = make_optimizer("clipup", params, 0.3)
    lengths = []
    for _ in range(5):
        before = flat(params)
        walk(optimizer, params, gradients(1, torch.float64), sign=1)
        lengths.append(float(np.linalg.norm(flat(params) - before)))
    # the direction is the same in every step: 0.3, then 0.9 * 0.3 + 0.3 = 0.57, then the limit
    assert lengths == pytest.approx([0.3, 0.57, 0.6, 0.6, 0.6], rel=1e-12)


def test_clipup_speed_limit_follows_a_changed_learning_rate() -> None:
    params = parameters(torch.float64)
    optimizer = make_optimizer("clipup", params, 0.3)
    walk(optimizer, params, gradients(1, torch.float64) * 3, sign=1)
    optimizer.param_groups[0]["lr"] = 0.01
    before = flat(params)
    walk(optimizer, params, gradients(1, torch.float64), sign=1)
    assert np.linalg.norm(flat(params) - before) == pytest.approx(0.02, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradient_at_rest_changes_nothing(name: Literal["adam", "sgd", "clipup"]) -> None:
    params = parameters()
    before = [parameter.detach().clone() for parameter in params]
    walk(make_optimizer(name, params, 0.1), params, [[torch.zeros(shape) for shape in SHAPES]] * 3, sign=1)
    assert all(torch.equal(parameter, old) for parameter, old in zip(params, before, strict=True))


def test_clipup_keeps_its_momentum_through_a_zero_gradient() -> None:
    params = parameters(torch.float64)
    optimizer = make_optimizer("clipup", params, 0.3)
    walk(optimizer, params, gradients(1, torch.float64), sign=1)
    before = flat(params)
    walk(optimizer, params, [[torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]], sign=1)
    assert np.linalg.norm(flat(params) - before) == pytest.approx(0.27, rel=1e-12)


def test_clipup_leaves_out_parameters_without_gradient() -> None:
    params = parameters()
    before = params[0].detach().clone()
    params[1].grad = torch.ones(3)
    ClipUp(params, 0.3).step()
    assert torch.equal(params[0], before)
    assert float((params[1].detach() - parameters()[1].detach()).norm()) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_continues_to_the_bit(name: Literal["adam", "sgd", "clipup"]) -> None:
    steps = gradients(8)
    params = parameters()
    optimizer = make_optimizer(name, params, 0.1)
    walk(optimizer, params, steps[:4], sign=1)
    later = [nn.Parameter(parameter.detach().clone()) for parameter in params]
    resumed = make_optimizer(name, later, 0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    walk(optimizer, params, steps[4:], sign=1)
    walk(resumed, later, steps[4:], sign=1)
    assert all(torch.equal(a, b) for a, b in zip(params, later, strict=True))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"adam, sgd or clipup.*'lion'"):
        make_optimizer("lion", parameters(), 0.1)  # pyright: ignore[reportArgumentType]
