"""Read-only tables of named entries, with errors that suggest similar names."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeVar

__all__ = ["Registry", "nearest_names"]

_Entry = TypeVar("_Entry")


class Registry(Mapping[str, _Entry]):
    """A read-only mapping from names to entries.

    Args:
      kind: a noun that describes an entry in error messages, such as `"rounding mode"`.
      entries: the entries by name.
      synonyms: common alternative spellings, each with the name that errors suggest for it.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, _Entry],
        synonyms: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.kind = kind
        self._entries = dict(entries)
        self.synonyms = MappingProxyType(dict(synonyms))
        if not set(self.synonyms.values()) <= set(self._entries):
            raise ValueError(f"Registry: every synonym must refer to a {kind} in the registry.")

    def __getitem__(self, name: str) -> _Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{len(self)} entries, each a {self.kind}: {', '.join(self)}>"

    def find(self, name: str) -> _Entry:
        """Returns the entry with a name.

        Raises:
          ValueError: no entry has that name. The message suggests the nearest ones.
        """
        if name not in self._entries:
            raise self.unknown(name, self.near(name))
        return self._entries[name]

    def resolve(self, value: str | _Entry, argument: str, method: str = "__call__") -> _Entry:
        """Returns the entry with a name, or the value itself if it can be an entry.

        Args:
          value: a name, or a user-defined entry.
          argument: the name of the argument in error messages.
          method: the method that every entry has.

        Raises:
          ValueError: no entry has that name.
          TypeError: the value is neither a name nor an object with the method.
        """
        if isinstance(value, str):
            return self.find(value)
        requirement = (
            f"`{argument}` must be a name or {'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"
        )
        if isinstance(value, type):
            raise TypeError(
                f"{requirement}, got the class {value.__name__}. "
                f"Pass an instance, such as {value.__name__}()."
            )
        if not hasattr(value, method):
            raise TypeError(
                f"{requirement}, got {type(value).__name__}. Names are {', '.join(self)}."
            )
        return value

    def name_of(self, entry: object) -> str | None:
        """Returns the first name of an entry, or None if it is not in the registry."""
        return next((name for name, value in self.items() if value == entry), None)

    def near(self, name: str) -> list[str]:
        """Returns up to three names similar to a misspelled one, the most similar first."""
        spelled = name.lower()
        near = difflib.get_close_matches(spelled, self._entries, n=3, cutoff=0.5)
        if spelled in self.synonyms:
            first = self.synonyms[spelled]
            near = [first, *(other for other in near if other != first)]
        return near[:3]

    def unknown(self, name: str, near: list[str]) -> ValueError:
        """Returns the error for an unknown name, which suggests the given similar names."""
        hint = f"Did you mean {', '.join(near[:3])}?" if near else f"Known: {', '.join(self)}."
        return ValueError(f"No {self.kind} is named {name!r}. {hint}")


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Returns the three known names most similar to a name, as text; "none" if none are known."""
    return ", ".join(difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.0)) or "none"
