"""Errors that the user can fix: the command line prints them as one line and exits with code 2."""

from __future__ import annotations

import re

# What torch, its libraries, Triton and warp say; torch.AcceleratorError is not raised for all of them.
_FAULT = re.compile(
    r"(CUDA|HIP)( driver| runtime)? (unknown )?error|CUDA driver|NVIDIA driver|cudaGetDeviceCount|No (CUDA|HIP) GPUs|"
    r"CUBLAS_STATUS|CUDNN_STATUS|cuDNN error|Triton Error \[|Failed to allocate .* on device",
    re.IGNORECASE,
)


class UserError(ValueError):
    """A request of the user cannot be fulfilled; the message says what is wrong and what is allowed."""


def gpu_fault(error: BaseException) -> str | None:
    """Return the first line of an error that a GPU or its driver caused; None for any other error."""
    lines = str(error).strip().splitlines()
    if isinstance(error, RuntimeError) and lines and _FAULT.search(lines[0]):
        return lines[0]
    return None
