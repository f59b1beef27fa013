"""The entry point: runs a command and converts any error to an exit code and one line of text."""

import contextlib
import io
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TextIO

from jaxq.cli._output import UsageError, one_line
from jaxq.cli._parser import build, guarded
from jaxq.interop import FileError

__all__ = ["main"]

_LONGEST = 600  # The maximum length of an error line; a hostile file may contain very long names.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `jaxq` command line.

    Args:
      argv: the command-line arguments. Default: None, the arguments of the process.

    Returns:
      The exit code: 0 for success, 1 for a failure, 2 for wrong arguments or a bad file, 130 for
      an interrupt, and 143 for SIGTERM.

    Example:
      >>> from jaxq import cli
      >>> cli.main(["formats", "int2", "--values"])
      int2
      hex  binary  value
      0x0      00      0
      0x1      01      1
      0x2      10     -2
      0x3      11     -1
      0
      >>> cli.main(["formats", "int44"])  # Prints an error on stderr.
      2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    # Python has no stream for a closed descriptor, and `print` would write errors to stdout then.
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal cannot show must not raise an error.
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build().parse_args(guarded(arguments))
        if args.command is None:
            build().print_help()
            return 0
        with _stopped_by_sigterm():
            args.run(args)
        sys.stdout.flush()
    except SystemExit as done:  # Raised by --help, --version and SIGTERM.
        return done.code if isinstance(done.code, int) else 0
    except BrokenPipeError:
        # The reader closed the pipe. Replacing stdout avoids Python's error message at exit.
        sys.stdout = _nowhere()
        return 0
    except KeyboardInterrupt:
        print("jaxq: interrupted", file=sys.stderr)
        return 130
    except (UsageError, FileError) as error:
        return _failed(error, one_line(error), 2, debug)
    except MemoryError as error:
        return _failed(error, f"not enough memory {one_line(error)}", 1, debug)
    except Exception as error:
        text = f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
        return _failed(error, text, 1, debug)
    return 0


def _nowhere() -> TextIO:
    """Returns a stream that discards what is written to it."""
    return pathlib.Path(os.devnull).open("w")


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Raises SystemExit on SIGTERM inside the context, so that temporary files are removed."""

    def stop(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # Only it may set handlers.
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _failed(error: BaseException, text: str, code: int, debug: bool) -> int:
    if debug:
        raise error
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…"
    print(f"jaxq: {text}", file=sys.stderr)
    return code
