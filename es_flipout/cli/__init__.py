"""The command line, ``es-flipout``: one module per command, and :func:`main`, which dispatches to them.

Importing this package and showing help must stay fast, so commands import torch only when they run.
"""

from es_flipout.cli.entry import main

__all__ = ["main"]
