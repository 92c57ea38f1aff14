"""Gradient ascent on the mean weights: torch's Adam and SGD, and ClipUp."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from es_flipout.errors import UserError


class ClipUp(torch.optim.Optimizer):
    """ClipUp (Toklu et al., "ClipUp: a simple and powerful optimizer for distribution-based policy evolution", PPSN 2020).

    The gradient with respect to all parameters is scaled to norm ``lr`` (the step size), momentum is added, and the
    velocity is clipped to norm ``max_speed``. Steps go uphill: higher is better.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.9, max_speed: float | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "max_speed": max_speed})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step along ``p.grad``."""
        for group in self.param_groups:
            # The paper recommends twice the step size.
            max_speed = 2 * group["lr"] if group["max_speed"] is None else group["max_speed"]
            params = [p for p in group["params"] if p.grad is not None]
            length = _norm([p.grad for p in params])
            scale = torch.where(length > 0, group["lr"] / length, torch.zeros_like(length))
            velocities = []
            for p in params:
                state = self.state[p]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(p)
                state["velocity"].mul_(group["momentum"]).add_(p.grad * scale)
                velocities.append(state["velocity"])
            speed = _norm(velocities)
            limit = torch.clamp(max_speed / speed.clamp_min(torch.finfo(speed.dtype).tiny), max=1.0)
            for p, velocity in zip(params, velocities, strict=True):
                velocity.mul_(limit)
                p.add_(velocity)


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))


def make_optimizer(
    name: Literal["adam", "sgd", "clipup"],
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Create the optimizer ``name``, which maximizes: it steps along ``p.grad``.

    Args:
        name: ``adam`` (``momentum`` is beta1), ``sgd`` (heavy-ball momentum) or ``clipup``.
        parameters: the mean weights.
        learning_rate: step size; for ``clipup``, the norm of one normalized step.
        momentum: in [0, 1).

    Raises:
        UserError: the optimizer is unknown, or a value is out of range.
    """
    if not learning_rate > 0:
        raise UserError(f"learning rate must be greater than 0, got {learning_rate}")
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must be in [0, 1), got {momentum}")
    match name:
        case "adam":
            return torch.optim.Adam(parameters, lr=learning_rate, betas=(momentum, 0.999), maximize=True, foreach=False)
        case "sgd":
            return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, maximize=True, foreach=False)
        case "clipup":
            return ClipUp(parameters, lr=learning_rate, momentum=momentum)
    raise UserError(f"optimizer must be adam, sgd or clipup, got {name!r}")
