"""The arguments of `jaxq`; each command has its own module.

To add a command, write a function here that adds its arguments and a function elsewhere that runs
it, and list both in `_COMMANDS`.
"""

import argparse
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from typing import NoReturn, get_args

from jaxq.analysis.machines import DEVICES, MODELS
from jaxq.cli import _compare as compare
from jaxq.cli import _formats as formats
from jaxq.cli import _inspect as inspect
from jaxq.cli import _memory as memory
from jaxq.cli import _plot as plot
from jaxq.cli import _quantize as quantize
from jaxq.cli import _recipes as recipes
from jaxq.cli import _report as report
from jaxq.cli._output import UsageError
from jaxq.cli._targets import WRITERS
from jaxq.numerics import ROUNDINGS, Overflow

__all__ = ["build", "guarded"]

_FILES = "a GGUF, safetensors, .npz or .npy file, or a folder of safetensors files"


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def guarded(argv: Sequence[str]) -> list[str]:
    """Prefixes negative numbers with a space, so that argparse does not read them as options.

    argparse recognizes -0.1 as a number, but not -1e-3 or -inf. An argument that begins with a
    space is never an option, and the conversion to a number ignores the space.
    """
    number = re.compile(r"-(\d.*|\.\d.*|inf(inity)?|nan)$", re.IGNORECASE)
    return [f" {text}" if number.match(text) else text for text in argv]


def _count(text: str) -> float:
    """Returns a number such as 7e9, 7B or 350M."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
    unit = units.get(text[-1:].lower())
    try:
        return float(text) if unit is None else float(text[:-1]) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 7B or 7e9") from None


def _seed(text: str) -> int:
    """Returns a seed; JAX would use only the low 32 bits of a larger one."""
    if not re.fullmatch(r"\s*\d{1,10}", text) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number below 2^32")
    return int(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("it must be a list of names, separated by commas")
    return names


def build() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = _Parser(
        prog="jaxq",
        description="Shows low-precision number formats; compares and quantizes tensors in files.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong arguments or a bad file, 130 interrupted.",
        allow_abbrev=False,
    )
    version = importlib.metadata.version("jaxq")
    parser.add_argument("--version", action="version", version=f"jaxq {version}")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (about, add, run) in _COMMANDS.items():
        sub = commands.add_parser(
            name, help=about, description=about, parents=[common], allow_abbrev=False
        )
        add(sub)
        sub.set_defaults(run=run)
    return parser


def _formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="formats; all by default")
    parser.add_argument(
        "--values", action="store_true", help="list every value, for formats of at most 8 bits"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("numbers", nargs="+", metavar="NUMBER", help="such as 0.1, -2, inf, nan")
    parser.add_argument(
        "--in",
        dest="formats",
        type=_names,
        required=True,
        metavar="FORMATS",
        help="names, separated by commas",
    )
    parser.add_argument(
        "--bits", action="store_true", help="the numbers are codes: 0x3f, 0b0111 or 63"
    )
    modes = list(ROUNDINGS)
    parser.add_argument(
        "--rounding", choices=modes, default="nearest_even", help="the rounding mode"
    )
    policies = list(get_args(get_args(Overflow)[0]))
    parser.add_argument(
        "--overflow",
        choices=policies,
        help="the result for numbers beyond the format's range (default: as in ml_dtypes)",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="the seed of stochastic rounding")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _compare(parser: argparse.ArgumentParser) -> None:
    several = f"{_FILES}; a pattern such as 'models/*.gguf'; or - for standard input"
    parser.add_argument("files", nargs="+", metavar="FILE", help=several)
    recipe_list = (
        "recipes, block types of GGUF, or formats for a cast without a scale, separated by commas"
    )
    parser.add_argument("--recipes", type=_names, metavar="NAMES", help=recipe_list)
    parser.add_argument("--include", metavar="REGEX", help="compare only tensors whose names match")
    parser.add_argument("--exclude", metavar="REGEX", help="skip tensors whose names match")
    parser.add_argument(
        "--min-axes",
        type=int,
        default=2,
        metavar="N",
        help="tensors of fewer axes are kept as they are (default: 2, so biases and norms)",
    )
    _axis(parser, default=-1)
    parser.add_argument(
        "--worst", type=int, metavar="N", help="show the N worst tensors of each recipe"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print all as JSON")
    group.add_argument("--csv", action="store_true", help="print all tensors as CSV")
    parser.add_argument("--html", metavar="REPORT.html", help="write a page with pictures, too")


def _axis(parser: argparse.ArgumentParser, default: int | None) -> None:
    """Adds `--axis`, the contracted axis of the tensors of a file."""
    default_text = "the last axis" if default is None else str(default)
    parser.add_argument(
        "--axis",
        type=int,
        default=default,
        metavar="N",
        help="the axis that products contract, along which blocks lie: -1 for weights "
        "[outputs, inputs] (PyTorch), -2 for kernels [inputs, outputs] (Flax); default: "
        f"{default_text}",
    )


def _plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a picture; without it, all are listed"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="a .png, .svg or .pdf file")
    for option in ("--formats", "--recipes", "--models", "--devices"):
        names = "names, separated by commas"
        parser.add_argument(option, type=_names, metavar="NAMES", help=names)
    parser.add_argument("--context", type=int, help="the number of cached tokens")
    parser.add_argument("--batch", type=int, help="the number of sequences")
    parser.add_argument("--title", help="the title above the picture")
    parser.add_argument(
        "--file", metavar="FILE", help="the file with the tensor (default: random normal numbers)"
    )
    parser.add_argument("--tensor", metavar="NAME", help="the name of the tensor in the file")
    _axis(parser, default=None)
    parser.add_argument("--seed", type=_seed, default=0, help="the seed of the random numbers")


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"one or more of {', '.join(MODELS)}"
    )
    parser.add_argument(
        "--params",
        type=_count,
        action="append",
        metavar="N",
        help="a number of parameters, such as 7B or 7e9",
    )
    names = "names, separated by commas"
    parser.add_argument("--recipes", type=_names, metavar="NAMES", help=names)
    parser.add_argument("--context", type=int, help="the number of cached tokens per sequence")
    parser.add_argument("--batch", type=int, help="the number of sequences")
    parser.add_argument("--kv", metavar="RECIPE", help="the recipe of keys and values")
    parser.add_argument(
        "--embeddings", metavar="RECIPE", help="the recipe of the embedding and the output layer"
    )
    parser.add_argument(
        "--overhead", type=float, help="other memory, as a fraction of the rest (0.1)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _fits(parser: argparse.ArgumentParser) -> None:
    _memory(parser)
    known = f"some of {', '.join(DEVICES)}, separated by commas"
    parser.add_argument("--devices", type=_names, metavar="NAMES", help=known)


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", metavar="LOG", help="a file of jaxq.analysis.StatisticsLog")
    parser.add_argument("-o", "--output", metavar="PAGE.html", help="write a page with pictures")
    parser.add_argument(
        "--worst",
        type=int,
        default=3,
        metavar="N",
        help="the number of tensors per statistic (default: 3)",
    )
    parser.add_argument(
        "--format", metavar="NAME", help="a float format whose range is drawn in the pictures"
    )


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help=_FILES)
    parser.add_argument(
        "--raw",
        action="store_true",
        help="list the tensors of a quantized weight one by one, as they are stored",
    )
    parser.add_argument("--metadata", action="store_true", help="print the metadata in full")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; all by default")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="IN", help=_FILES)
    parser.add_argument(
        "output", metavar="OUT", help="a .safetensors (for jaxq.load), a .gguf, or a new folder"
    )
    parser.add_argument(
        "--to",
        choices=list(WRITERS),
        help="the kind of the output: compressed-tensors is a folder for vLLM (default: by the "
        "ending of OUT)",
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="the recipe of all tensors that no rule matches"
    )
    parser.add_argument(
        "--rules",
        metavar="FILE",
        help="JSON, a list of pairs [regular expression, recipe or null]: the first expression "
        "found in a tensor's name counts, and null keeps the tensor",
    )
    parser.add_argument(
        "--names",
        choices=["auto", "keep"],
        default="auto",
        help="auto gives tensors of a Hugging Face model the names of GGUF; keep copies names "
        "(default: auto)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a .gguf file whose tokenizer is copied to a GGUF output",
    )
    parser.add_argument(
        "--imatrix",
        metavar="FILE",
        help="an importance matrix for GGUF types: a .gguf that llama-imatrix wrote",
    )
    parser.add_argument(
        "--dynamic-activations",
        action="store_true",
        help="vLLM also quantizes the inputs of int8 or float8_e4m3fn weights, per token",
    )
    parser.add_argument(
        "--min-axes",
        type=int,
        default=2,
        metavar="N",
        help="tensors of fewer axes are kept as they are (default: 2)",
    )
    _axis(parser, default=-1)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


_Command = tuple[
    str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]
]

_COMMANDS: dict[str, _Command] = {
    "formats": ("properties or values of number formats", _formats, formats.list_formats),
    "show": ("numbers rounded to formats, with their bits", _show, formats.show),
    "compare": ("errors and sizes of the tensors of a file under recipes", _compare, compare.run),
    "inspect": ("the tensors and the metadata of a file", _inspect, inspect.run),
    "recipes": ("the named recipes: bits, blocks and scales", _recipes, recipes.run),
    "quantize": ("write a file with its tensors quantized", _quantize, quantize.run),
    "plot": ("draw a picture of formats, recipes or a tensor", _plot, plot.run),
    "report": (
        "tensors and steps of a training run with the largest errors",
        _report,
        report.run,
    ),
    "memory": ("memory of a model under several recipes", _memory, memory.memory),
    "fits": ("models and the accelerators that they fit on", _fits, memory.fits),
}
