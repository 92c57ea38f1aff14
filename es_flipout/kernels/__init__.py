"""Triton kernels, each beside its plain-torch twin, and the choice of whether they are used.

Triton is optional: this module does not import it, its sub-modules do. With ``TRITON_INTERPRET=1``, set before Triton is
imported, the kernels run on the CPU (slowly): that is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

from es_flipout.errors import UserError

KernelChoice = Literal["auto", "torch", "triton"]
Precision = Literal["ieee", "tf32x3", "tf32", "bf16"]
Activation = Literal["none", "tanh", "relu", "elu", "silu", "gelu"]

_LEAST_CAPABILITY = (8, 0)  # the first with TF32 and bf16


def chosen(choice: KernelChoice, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether populations on ``device`` with parameters of ``dtype`` use the Triton kernels.

    Args:
        choice: ``auto`` takes them wherever they run: on CUDA, in float32, with Triton installed.
        device: where the population is computed.
        dtype: of the parameters.

    Raises:
        UserError: ``choice`` is ``triton`` and they cannot run, or is none of the three.
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
    """The precision itself.

    Raises:
        UserError: there is no such precision.
    """
    if precision not in ("ieee", "tf32x3", "tf32", "bf16"):
        raise UserError(f"precision must be one of ieee, tf32x3, tf32, bf16, got {precision!r}")
    return precision


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype != torch.float32:
        return f"they compute float32 parameters, not {dtype}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < _LEAST_CAPABILITY:
            return "they need a GPU of compute capability {}.{}, this one has {}.{}".format(
                *_LEAST_CAPABILITY, *capability
            )
        return None
    return None if interpreted() else f"they need a CUDA device, and the population is on {device.type}"
