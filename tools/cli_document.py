"""Writes the output of every command in docs/cli.md behind it.

    python tools/cli_document.py --checkpoint model.safetensors

Without a checkpoint the commands that need one keep the output that they have, and the picture
stays as it is. `tests/test_cli.py` uses `blocks` and `output_of` to compare the page with a run.
"""

import argparse
import contextlib
import io
import os
import pathlib
import re
import shlex

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "cli.md"
_BLOCK = re.compile(r"^```console\n\$ jaxq (.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """The arguments of every command on a page, and the output that stands behind it."""
    return [(match[1], match[2]) for match in _BLOCK.finditer(text)]


def needs_a_file(arguments: str) -> bool:
    """Whether a command reads or writes a file."""
    return "safetensors" in arguments or " -o " in arguments


def output_of(arguments: str) -> str:
    """What a command prints."""
    from jaxq.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        main(shlex.split(arguments))
    return printed.getvalue()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=pathlib.Path)
    checkpoint = parser.parse_args().checkpoint
    text = PAGE.read_text()
    if checkpoint is not None:
        checkpoint = checkpoint.resolve()

    def written(match: re.Match[str]) -> str:
        arguments, out = match[1], match[2]
        if not needs_a_file(arguments):
            out = output_of(arguments)
        elif checkpoint is not None and "broken" not in arguments:
            out = output_of(arguments.replace("model.safetensors", shlex.quote(str(checkpoint))))
        return f"```console\n$ jaxq {arguments}\n{out}```"

    os.chdir(PAGE.parent / "images")  # Where its picture goes.
    PAGE.write_text(_BLOCK.sub(written, text))


if __name__ == "__main__":
    _main()
