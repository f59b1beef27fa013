"""The command line `jaxq`: `_parser` defines the arguments, and each command has its own module."""

from jaxq.cli._main import main

__all__ = ["main"]
