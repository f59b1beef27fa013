"""How Sphinx builds the site: `make docs`. Pages with a kernel header are run while it does.

Strict: a warning, a reference that leads nowhere, a cell that raises or writes to stderr ends the
build. To add a page: write it, and name it in the `toctree` of the page above it.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# The kernels inherit these: pages import this tree, and are written for a CPU.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
os.environ["JAX_PLATFORMS"] = "cpu"

import jaxq  # noqa: E402  It is on the path only now.

project = "jaxq"
copyright = "The jaxq authors"
version = release = jaxq.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "jaxq"
html_static_path = ["_static"]
html_css_files = ["jaxq.css"]
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Inline: only so may the text show what the page has computed, by {eval}.
nb_execution_mode = "inline"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_output_stderr = "error"
nb_merge_streams = True
nb_eval_name_regex = r"^.+$"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_prompt_text = ">>> "

nitpicky = True
# Types of other libraries, and names within jaxq that only a signature mentions. There are no
# inventories of other projects here, so that the site builds without a network.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|np|numpy|optax|ml_dtypes|collections|collections\.abc|typing)\..*"),
]
nitpick_ignore = [
    ("py:class", "Figure"),  # matplotlib's
    ("py:class", "ArrayTree"),  # chex's
    ("py:class", "Rules"),
    ("py:class", "Recipe"),
    ("py:class", "jaxq.blocks.Cut"),
    ("py:class", "jaxq.ranges.Averages"),
    ("py:class", "jaxq.ranges.Moments"),
    ("py:class", "jaxq.histograms.Histogram"),
    ("py:class", "jaxq.histograms._Seen"),
    ("py:class", "jaxq.histories.Amax"),
]
linkcheck_anchors = False

default_role = "smart"


class Smart(PyXRefRole):
    """`name` in a docstring: a link if the site documents the name, else code."""

    def __init__(self) -> None:
        super().__init__(innernodeclass=nodes.literal)

    def process_link(self, env: Any, refnode: Any, *args: Any) -> tuple[str, str]:
        """The reference, which may lead nowhere."""
        title, target = super().process_link(env, refnode, *args)
        refnode["refdomain"], refnode["reftype"], refnode["smart"] = "py", "obj", True
        return title, target


def _no_such_name(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """A name that the site does not document is plain code."""
    del app, env
    return contnode if node.get("smart") else None


def _plain_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list) -> None:
    """Docstrings are text: what reStructuredText would make of | and * there is not meant."""
    del app, name, obj, options
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(": ", "; ", 1)  # Else what stands before it counts as a type.
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"([|*]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
            # A plural: nothing may stand right behind the code, so an escaped space does.
            parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in parts[2::2]]
            lines[i] = "".join(parts)


# What unions are called: autodoc spells them out.
_UNIONS = {
    "~jax.Array | ~numpy.ndarray | ~numpy.bool | ~numpy.number | bool | int | float | complex": (
        "~jax.typing.ArrayLike"
    ),
    "~jaxq.formats.floats.FloatFormat | ~jaxq.formats.integers.IntFormat"
    " | ~jaxq.formats.codebooks.CodebookFormat | ~jaxq.formats.tapered.TaperedFormat": (
        "~jaxq.Format"
    ),
}


def _short_types(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str]:
    """Signatures that name unions."""
    del app, what, name, obj, options
    for union, short in _UNIONS.items():
        signature = signature and signature.replace(union, short)
    return signature, returns


def _no_aliases(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> Any:
    """The fields of a NamedTuple are in its docstring; Python's own text says nothing of them."""
    del app, what, name, skip, options
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """What this file adds to Sphinx."""
    app.add_role("smart", Smart())
    app.connect("missing-reference", _no_such_name)
    app.connect("autodoc-skip-member", _no_aliases)
    app.connect("autodoc-process-signature", _short_types)
    app.connect("autodoc-process-docstring", _plain_text, priority=400)
