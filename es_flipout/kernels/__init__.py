"""Triton kernels, each with a twin in plain torch, and the decision whether to use them.

Triton is optional: only the submodules import it. With ``TRITON_INTERPRET=1``, set before Triton is imported, the
kernels run on the CPU (slowly), which is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from es_flipout.errors import UserError

KernelChoice = Literal["auto", "torch", "triton"]
Precision = Literal["ieee", "tf32x3", "tf32", "bf16"]
Activation = Literal["none", "tanh", "relu", "elu", "silu", "gelu"]


class MemberNoise(NamedTuple):
    """The members whose noise a kernel applies, and how it does so.

    Attributes:
        members: ``(n,)`` int32 or int64, the member of each row; in any order, repetitions allowed.
        per_source: number of members per noise source: 2 with antithetic pairs.
        sigma: standard deviation of the perturbations; a 0-dimensional tensor is read when the kernel runs.
        precision: precision of the matrix products; sums are float32.
    """

    members: Tensor
    per_source: int
    sigma: float | Tensor
    precision: Precision = "ieee"


_LEAST_CAPABILITY = (8, 0)  # the first one with TF32 and bf16


def chosen(choice: KernelChoice, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether populations on ``device`` with parameters of ``dtype`` use the Triton kernels.

    Args:
        choice: ``auto`` uses them wherever they are supported: on CUDA, in float32, with Triton installed.
        device: device of the population.
        dtype: data type of the parameters.

    Raises:
        UserError: ``choice`` is invalid, or it is ``triton`` and the kernels cannot run.
    """
    if choice not in ("auto", "torch", "triton"):
        raise UserError(f"kernels must be one of auto, torch, triton, got {choice!r}")
    if choice == "torch":
        return False
    obstacle = _obstacle(device, dtype)
    if choice == "triton" and obstacle is not None:
        raise UserError(f"kernels triton cannot be used: {obstacle}; use kernels auto or torch")
    return obstacle is None and (choice == "triton" or device.type == "cuda")


def check_precision(precision: Precision) -> Precision:
    """Return ``precision`` if it is valid.

    Raises:
        UserError: the precision is unknown.
    """
    if precision not in ("ieee", "tf32x3", "tf32", "bf16"):
        raise UserError(f"precision must be one of ieee, tf32x3, tf32, bf16, got {precision!r}")
    return precision


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype != torch.float32:
        return f"they support float32 parameters, not {dtype}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < _LEAST_CAPABILITY:
            return "they need a GPU of compute capability {}.{} or higher, and this one has {}.{}".format(
                *_LEAST_CAPABILITY, *capability
            )
        return None
    return None if interpreted() else f"they need a CUDA device, and the population is on {device.type}"
