"""The configuration of the site, which `make docs` builds with Sphinx.

Pages with a kernel header are executed during the build. The build fails on a warning, on a broken
reference, and on a cell that raises or writes to stderr. To add a page, write it and list it in the
`toctree` of its parent page.
"""

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "_extensions")]
# The kernels inherit these variables: pages import this tree and run on the CPU.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
os.environ["JAX_PLATFORMS"] = "cpu"

import jaxq  # noqa: E402  The path is set above.

project = "jaxq"
copyright = "The jaxq authors"
version = release = jaxq.__version__

extensions = [
    "mathematics",
    "myst_nb",
    "notebooks",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_extensions"]
html_theme = "furo"
html_title = "jaxq"
html_static_path = ["_static"]
html_css_files = ["jaxq.css"]
html_js_files = ["tables.js"]
html_logo = html_favicon = "_static/logo.svg"
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Only inline execution supports {eval}, which inserts computed values into the text.
nb_execution_mode = "inline"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_output_stderr = "error"
nb_merge_streams = True
nb_eval_name_regex = r"^.+$"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_prompt_text = ">>> "

nitpicky = True
# Types of other libraries, and private names that occur in signatures only. No inventories of other
# projects are loaded, so that the site builds without a network.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|np|numpy|optax|ml_dtypes|collections|os|pathlib|typing|zipfile)\..*"),
]
nitpick_ignore = [
    ("py:class", "Figure"),  # matplotlib's
    ("py:class", "Console"),  # rich's
    ("py:class", "ArrayTree"),  # chex's
    ("py:class", "Rules"),
    ("py:class", "jaxq._base.cutting.Cut"),
    ("py:class", "jaxq.recipes._ranges.Averages"),
    ("py:class", "jaxq.recipes._moments.Moments"),
    ("py:class", "jaxq.recipes._histograms.Histogram"),
    ("py:class", "jaxq.products._histories.Amax"),
    ("py:class", "jaxq.products._rows.Probe"),
    ("py:class", "jaxq.products._rows.Row"),
    ("py:class", "jaxq.products._recipe.PerProduct"),
    ("py:class", "jaxq.models._rules._states.Switch"),
    ("py:class", "jaxq.quantizers._levels.Levels"),
    ("py:class", "jaxq.quantizers._slices.Slices"),
]
linkcheck_anchors = False

default_role = "smart"


class Smart(PyXRefRole):
    """The role of `name` in a docstring: a link if the site documents the name, else code."""

    def __init__(self) -> None:
        super().__init__(innernodeclass=nodes.literal)

    def process_link(self, env: Any, refnode: Any, *args: Any) -> tuple[str, str]:
        """Returns the title and the target of the reference, which may not exist."""
        title, target = super().process_link(env, refnode, *args)
        refnode["refdomain"], refnode["reftype"], refnode["smart"] = "py", "obj", True
        return title, target


def _no_such_name(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Returns plain code for a name that the site does not document."""
    del app, env
    return contnode if node.get("smart") else None


def _plain_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list) -> None:
    """Escapes characters of docstrings that are markup in reStructuredText, such as | and *."""
    del app, name, obj, options
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(": ", "; ", 1)  # Text before a colon would count as a type.
    example = False  # The lines of a doctest, including its output, are code.
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"([|*]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
            # An escaped space separates inline code from a letter after it, as in a plural.
            parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in parts[2::2]]
            lines[i] = "".join(parts)


# Names of unions, which autodoc writes out in full.
_UNIONS = {
    "~jax.Array | ~numpy.ndarray | ~numpy.bool | ~numpy.number | bool | int | float | complex": (
        "~jax.typing.ArrayLike"
    ),
    "~jaxq.formats._floats.FloatFormat | ~jaxq.formats._integers.IntFormat"
    " | ~jaxq.formats._codebooks.CodebookFormat | ~jaxq.formats._tapered.TaperedFormat": (
        "~jaxq.Format"
    ),
    "~jax.typing.ArrayLike | ~typing.Iterable[ArrayTree]"
    " | ~typing.Mapping[~typing.Any, ArrayTree]": "ArrayTree",
}
_RULES = re.compile(r"\S*\.Frozen \| \S*\.Delayed \| .*?\| None\]\]\]?")
# Defaults that are no Python expressions, for which Sphinx would show the signature as plain text.
_CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
_FACTORY = "<factory>"
_CONSTANT = re.compile(r"= (_[A-Z]+)\b")


def _short_types(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str]:
    """Replaces unions and classes by their names, and private constants by their values."""
    del app, what, name, options
    constants = getattr(inspect.unwrap(obj), "__globals__", {}) if callable(obj) else {}

    def value(match: re.Match) -> str:
        return f"= {constants[match[1]]!r}" if match[1] in constants else match[0]

    signature = signature and _CONSTANT.sub(value, signature)
    return _shortened(signature), _shortened(returns)


def _shortened(text: str) -> str:
    for union, short in _UNIONS.items():
        text = text and text.replace(union, short)
    return text and _RULES.sub("Rules", _CLASS.sub(r"\1", text).replace(_FACTORY, "..."))


def _no_aliases(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> Any:
    """Skips the fields of NamedTuples, which are described in the docstring of the class."""
    del app, what, name, skip, options
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """Registers the role and the event handlers of this file."""
    app.add_role("smart", Smart())
    app.connect("missing-reference", _no_such_name)
    app.connect("autodoc-skip-member", _no_aliases)
    app.connect("autodoc-process-signature", _short_types)
    app.connect("autodoc-process-docstring", _plain_text, priority=400)
