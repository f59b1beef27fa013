"""Updates the output of the commands in docs/cli.md.

    python tools/cli_document.py --checkpoint model.safetensors

Without a checkpoint, the outputs of commands that read or write a file, and the picture, are not
changed. `tests/test_cli.py` uses `blocks` and `output_of` to compare the page with a run.
"""

import argparse
import contextlib
import io
import os
import pathlib
import re
import shlex

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "cli.md"
# A long command continues after a backslash at the end of a line.
_BLOCK = re.compile(r"^```console\n\$ jaxq ((?:.*\\\n)*.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """Returns the arguments and the printed output of every command on a page."""
    return [(match[1].replace("\\\n", ""), match[2]) for match in _BLOCK.finditer(text)]


def needs_a_file(arguments: str) -> bool:
    """Returns whether a command reads or writes a file."""
    return "safetensors" in arguments or " -o " in arguments


def output_of(arguments: str) -> str:
    """Runs a command and returns the text that it prints."""
    from jaxq.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        main(shlex.split(arguments))
    return printed.getvalue()


def _main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, help="the file to use as model.safetensors"
    )
    checkpoint = parser.parse_args().checkpoint
    text = PAGE.read_text()
    if checkpoint is not None:
        checkpoint = checkpoint.resolve()

    def updated(match: re.Match[str]) -> str:
        arguments, out = match[1], match[2]
        if not needs_a_file(arguments):
            out = output_of(arguments)
        elif checkpoint is not None and "broken" not in arguments:
            out = output_of(arguments.replace("model.safetensors", shlex.quote(str(checkpoint))))
        return f"```console\n$ jaxq {arguments}\n{out}```"

    os.chdir(PAGE.parent / "images")  # The page's commands write the picture here.
    PAGE.write_text(_BLOCK.sub(updated, text))


if __name__ == "__main__":
    _main()
