"""Runs a command, and turns whatever happens into an exit code and at most one line."""

import io
import os
import pathlib
import sys
from collections.abc import Sequence

from jaxq.cli.output import UsageError, one_line
from jaxq.cli.parser import build, guarded

__all__ = ["main"]

_LONGEST = 600  # Of an error's line: a hostile file may have very long names.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxq`.

    Args:
      argv: the arguments; None: those of the process.

    Returns:
      The exit code: 0 done, 1 a failure, 2 wrong arguments or a bad file, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # A name that the terminal cannot show is no error.
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build().parse_args(guarded(arguments))
        if args.command is None:
            build().print_help()
            return 0
        args.run(args)
        sys.stdout.flush()
    except SystemExit as done:  # --help and --version.
        return done.code if isinstance(done.code, int) else 0
    except BrokenPipeError:
        # The reader has what it wanted. Python would complain when it closes the stream.
        sys.stdout = pathlib.Path(os.devnull).open("w")
        return 0
    except KeyboardInterrupt:
        print("jaxq: interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        return _failed(error, one_line(error), 2, debug)
    except MemoryError as error:
        return _failed(error, f"not enough memory {one_line(error)}", 1, debug)
    except Exception as error:
        text = f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
        return _failed(error, text, 1, debug)
    return 0


def _failed(error: BaseException, text: str, code: int, debug: bool) -> int:
    if debug:
        raise error
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…"
    print(f"jaxq: {text}", file=sys.stderr)
    return code
