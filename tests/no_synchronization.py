"""A block of a test in which waiting for the GPU is an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Make every synchronization with the GPU an error, and restore the default in any case.

    torch warns once per process that this mode is a prototype, after it has set the mode. Warnings are errors in these
    tests, so the mode would stay for all later ones.
    """
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
