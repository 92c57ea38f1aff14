"""The mapping from network outputs to actions of a Gymnasium space.

Letters: ``n`` rows, ``A`` action size.
"""

from __future__ import annotations

from typing import Literal

import gymnasium
import torch
from torch import Tensor

from es_flipout.errors import UserError


class ActionMap:
    """Maps network outputs to actions of a space.

    ``Discrete``: the action with the largest output. ``Box``: an output of -1 is the lower and +1 the upper bound of
    the action, 0 the middle; outputs outside are clipped (``clip``) or squashed (``tanh``). For an entry with an
    infinite bound, the action is the output itself, clipped at the other bound.

    Attributes:
        size: number of outputs that the network must have.
    """

    def __init__(self, space: gymnasium.Space, squash: Literal["clip", "tanh"] = "clip") -> None:
        self.space = space
        self.squash = squash
        if isinstance(space, gymnasium.spaces.Discrete):
            self.size = int(space.n)
            self.start = int(space.start)
        elif isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
            self.size = space.shape[0]
            low = torch.as_tensor(space.low, dtype=torch.float32)
            high = torch.as_tensor(space.high, dtype=torch.float32)
            self.bounded = torch.isfinite(low) & torch.isfinite(high)
            self.low, self.high = low, high
            self.middle = torch.where(self.bounded, (low + high) / 2, 0)
            self.half_range = torch.where(self.bounded, (high - low) / 2, 1)
            self.is_unit = bool((low == -1).all() and (high == 1).all())
        else:
            raise UserError(f"the action space {space} is not supported; supported: Discrete and one-dimensional Box")

    def to(self, device: torch.device) -> ActionMap:
        """Move the bounds to a device, in place, and return the map."""
        if not isinstance(self.space, gymnasium.spaces.Discrete):
            for name in ("bounded", "low", "high", "middle", "half_range"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def __call__(self, output: Tensor) -> Tensor:
        """Map outputs ``(n, size)`` to ``(n,)`` int64 (Discrete) or ``(n, A)`` floating-point (Box) actions."""
        if isinstance(self.space, gymnasium.spaces.Discrete):
            return output.argmax(-1) + self.start
        action = output.clamp(-1, 1) if self.squash == "clip" else output.tanh()
        if self.is_unit:
            return action
        action = torch.where(self.bounded, self.middle + self.half_range * action, output)
        return action.clamp(self.low, self.high)  # rounding may have left the space


def check_observation_space(space: gymnasium.Space) -> int:
    """Return the observation size ``O`` of a one-dimensional ``Box``.

    Raises:
        UserError: the space is not a one-dimensional ``Box``.
    """
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise UserError(f"the observation space {space} is not supported; supported: one-dimensional Box")
    return space.shape[0]
