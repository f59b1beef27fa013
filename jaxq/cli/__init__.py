"""The command line `jaxq`: `_parser` has the arguments, and each command has its own module.

To add a command, list it in `_COMMANDS` (`_parser.py`).
"""

from jaxq.cli._main import main

__all__ = ["main"]
