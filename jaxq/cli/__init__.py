"""The command line `jaxq`: arguments in `parser`, files in `files`, each command in its module."""

from jaxq.cli.main import main

__all__ = ["main"]
