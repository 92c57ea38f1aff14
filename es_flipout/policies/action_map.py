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
    an infinite bound, the action is the output itself, clipped at the other bound. ``MultiDiscrete``: one output for
    every choice of every entry, and the largest of each entry is chosen. ``MultiBinary``: an entry is 1 if its output is
    positive.

    Attributes:
        size: number of outputs that the network must have.
    """

    def __init__(self, space: gymnasium.Space, squash: Literal["clip", "tanh"] = "clip") -> None:
        self.space = space
        self.squash = squash
        self._is_box = False
        if isinstance(space, gymnasium.spaces.Discrete):
            self.size = int(space.n)
            self.start = int(space.start)
        elif isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
            self.size, self._is_box = space.shape[0], True
            low = torch.as_tensor(space.low, dtype=torch.float32)
            high = torch.as_tensor(space.high, dtype=torch.float32)
            self.bounded = torch.isfinite(low) & torch.isfinite(high)
            self.low, self.high = low, high
            self.middle = torch.where(self.bounded, (low + high) / 2, 0)
            self.half_range = torch.where(self.bounded, (high - low) / 2, 1)
            self.is_unit = bool((low == -1).all() and (high == 1).all())
        elif isinstance(space, gymnasium.spaces.MultiDiscrete) and len(space.shape) == 1:
            self.choices = [int(count) for count in space.nvec]
            self.size = sum(self.choices)
            self.starts = torch.as_tensor(space.start, dtype=torch.int64)
        elif isinstance(space, gymnasium.spaces.MultiBinary) and len(space.shape) == 1:
            self.size = space.shape[0]
        else:
            raise UserError(
                f"the action space {space} is not supported; supported: Discrete, and Box, MultiDiscrete and MultiBinary of "
                "one dimension"
            )

    def to(self, device: torch.device) -> ActionMap:
        """Move the bounds to a device, in place, and return the map."""
        if isinstance(self.space, gymnasium.spaces.MultiDiscrete):
            self.starts = self.starts.to(device)
        elif isinstance(self.space, gymnasium.spaces.Box):
            for name in ("bounded", "low", "high", "middle", "half_range"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def __call__(self, output: Tensor) -> Tensor:
        """Map outputs ``(n, size)`` to actions: ``(n,)`` int64 (Discrete), ``(n, A)`` floating-point (Box) or int64."""
        if self._is_box:
            action = output.clamp(-1, 1) if self.squash == "clip" else output.tanh()
            if self.is_unit:
                return action
            action = torch.where(self.bounded, self.middle + self.half_range * action, output)
            return action.clamp(self.low, self.high)  # rounding may have left the space
        if isinstance(self.space, gymnasium.spaces.Discrete):
            return output.argmax(-1) + self.start
        if isinstance(self.space, gymnasium.spaces.MultiDiscrete):
            return torch.stack([entry.argmax(-1) for entry in output.split(self.choices, -1)], -1) + self.starts
        return (output > 0).long()


def check_observation_space(space: gymnasium.Space) -> int:
    """Return the observation size ``O`` of a one-dimensional ``Box``.

    Raises:
        UserError: the space is not a one-dimensional ``Box``.
    """
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise UserError(f"the observation space {space} is not supported; supported: one-dimensional Box")
    return space.shape[0]
