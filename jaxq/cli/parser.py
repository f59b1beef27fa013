"""The arguments of `jaxq`, and nothing else: what each command does is in a module of its own.

To add a command: a function here that adds its parser, listed in `_COMMANDS`, and one that runs it.
"""

import argparse
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from jaxq import catalog, presets, rounding
from jaxq.analysis import plots
from jaxq.analysis.machines import DEVICES, MODELS
from jaxq.cli import compare, formats, memory, plot
from jaxq.cli.completion import completion
from jaxq.cli.output import UsageError

__all__ = ["build", "guarded"]

_RECIPES = [*presets.ALL, *catalog.ALL]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def guarded(argv: Sequence[str]) -> list[str]:
    """Arguments in which negative numbers cannot be taken for options.

    argparse knows -0.1 for a number, but not -1e-3 or -inf. What begins with a space is never an
    option, and the space is none of the number's.
    """
    number = re.compile(r"-(\d.*|\.\d.*|inf(inity)?|nan)$", re.IGNORECASE)
    return [f" {text}" if number.match(text) else text for text in argv]


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names, separated by commas, are needed")
    return names


def _option(parser: argparse.ArgumentParser, *names: str, words: Iterable[str] = (), **kw: Any):
    """An option, with the words that completion offers for its value."""
    action = parser.add_argument(*names, **kw)
    vars(action)["words"] = list(words)
    return action


def build() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="jaxq",
        description="Low-precision number formats and quantizers: what they are, what they cost.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong arguments or a bad file, 130 interrupted.",
        allow_abbrev=False,
    )
    version = importlib.metadata.version("jaxq")
    parser.add_argument("--version", action="version", version=f"jaxq {version}")
    common = _Parser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", help="show where an error comes from: a traceback"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (about, add, run) in _COMMANDS.items():
        sub = commands.add_parser(
            name, help=about, description=about, parents=[common], allow_abbrev=False
        )
        add(sub)
        sub.set_defaults(run=run)
    return parser


def _formats(parser: argparse.ArgumentParser) -> None:
    _option(parser, "names", nargs="*", metavar="NAME", words=catalog.ALL, help="all if left out")
    _option(parser, "--values", action="store_true", help="every value, of at most 8 bits")
    _option(parser, "--json", action="store_true", help="print JSON")


def _show(parser: argparse.ArgumentParser) -> None:
    _option(parser, "numbers", nargs="+", metavar="NUMBER", help="such as 0.1, -2, inf, nan")
    _option(
        parser,
        "--in",
        dest="formats",
        type=_names,
        required=True,
        metavar="FORMATS",
        words=catalog.ALL,
        help="names, separated by commas",
    )
    _option(parser, "--bits", action="store_true", help="the numbers are codes: 0x3f, 0b0111 or 63")
    modes = list(rounding.ALL)
    _option(
        parser, "--rounding", choices=modes, default="nearest_even", words=modes, help="the mode"
    )
    policies = ["saturate", "propagate"]
    _option(
        parser,
        "--overflow",
        choices=policies,
        words=policies,
        help="what is beyond the format's end becomes its largest value; left out: as ml_dtypes",
    )
    _option(parser, "--seed", type=int, default=0, help="of stochastic rounding")
    _option(parser, "--json", action="store_true", help="print JSON")


def _compare(parser: argparse.ArgumentParser) -> None:
    _option(parser, "file", metavar="FILE", help="a .safetensors, .npz or .npy")
    recipe_list = "presets, or formats for a plain cast, separated by commas"
    _option(parser, "--recipes", type=_names, words=_RECIPES, metavar="NAMES", help=recipe_list)
    _option(parser, "--include", metavar="REGEX", help="only tensors in whose name it is found")
    _option(parser, "--exclude", metavar="REGEX", help="no tensors in whose name it is found")
    _option(
        parser,
        "--min-axes",
        type=int,
        default=2,
        metavar="N",
        help="tensors of fewer axes are kept as they are (default: 2, so biases and norms)",
    )
    _option(
        parser, "--worst", type=int, metavar="N", help="show the N worst tensors of each recipe"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print all as JSON")
    group.add_argument("--csv", action="store_true", help="print all tensors as CSV")
    _option(parser, "--html", metavar="REPORT.html", help="write a page with pictures, too")


def _plot(parser: argparse.ArgumentParser) -> None:
    _option(
        parser, "name", nargs="?", metavar="NAME", words=plots.ALL, help="all are listed without"
    )
    _option(parser, "-o", "--output", metavar="FILE", help="ends in .png, .svg or .pdf")
    for option, words in (
        ("--formats", catalog.ALL),
        ("--recipes", _RECIPES),
        ("--models", MODELS),
        ("--devices", DEVICES),
    ):
        names = "separated by commas"
        _option(parser, option, type=_names, metavar="NAMES", words=list(words), help=names)
    _option(parser, "--context", type=int, help="tokens in the cache")
    _option(parser, "--batch", type=int, help="sequences")
    _option(parser, "--title", help="above the picture")
    _option(parser, "--file", metavar="FILE", help="where numbers come from; else normal ones")
    _option(parser, "--tensor", metavar="NAME", help="which of the file's tensors")
    _option(parser, "--seed", type=int, default=0, help="of the normal numbers")


def _memory(parser: argparse.ArgumentParser) -> None:
    _option(
        parser, "models", nargs="*", metavar="MODEL", words=MODELS, help=f"of {', '.join(MODELS)}"
    )
    _option(
        parser, "--params", type=float, action="append", metavar="N", help="parameters, such as 7e9"
    )
    names = "separated by commas"
    _option(parser, "--recipes", type=_names, words=_RECIPES, metavar="NAMES", help=names)
    _option(parser, "--context", type=int, help="tokens in the cache, of each sequence")
    _option(parser, "--batch", type=int, help="sequences")
    _option(parser, "--kv", metavar="RECIPE", words=_RECIPES, help="of keys and values")
    _option(
        parser, "--embeddings", metavar="RECIPE", words=_RECIPES, help="of embedding and output"
    )
    _option(parser, "--overhead", type=float, help="what else it takes, as a share (0.1)")
    _option(parser, "--json", action="store_true", help="print JSON")


def _fits(parser: argparse.ArgumentParser) -> None:
    _memory(parser)
    known = f"of {', '.join(DEVICES)}, separated by commas"
    _option(parser, "--devices", type=_names, words=DEVICES, metavar="NAMES", help=known)


def _completion(parser: argparse.ArgumentParser) -> None:
    shells = ["bash", "zsh", "fish"]
    _option(parser, "shell", choices=shells, words=shells, help="whose script is printed")


def _print_completion(args: argparse.Namespace) -> None:
    print(completion(args.shell, build()), end="")


_Command = tuple[
    str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]
]

_COMMANDS: dict[str, _Command] = {
    "formats": ("properties or values of number formats", _formats, formats.list_formats),
    "show": ("what formats make of a number, to the bit", _show, formats.show),
    "compare": ("what recipes do to the tensors of a file", _compare, compare.run),
    "plot": ("draw one of the pictures", _plot, plot.run),
    "memory": ("what a model takes in several recipes", _memory, memory.memory),
    "fits": ("which model fits which accelerator", _fits, memory.fits),
    "completion": ("a script that completes jaxq's arguments", _completion, _print_completion),
}
