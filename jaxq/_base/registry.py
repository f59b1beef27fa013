"""Read-only tables of named entries, with errors that suggest similar names."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeVar

__all__ = ["Registry", "suggestion"]

_Entry = TypeVar("_Entry")
_LONGEST = 160  # The number of characters of the names that an error lists.


class Registry(Mapping[str, _Entry]):
    """A read-only mapping from names to entries.

    Args:
      kind: a noun that describes an entry in error messages, such as `"rounding mode"`.
      entries: the entries by name.
      suggestions: common wrong names, each with the name that the error suggests; they are not
        accepted.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, _Entry],
        suggestions: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.kind = kind
        self._entries = dict(entries)
        self.suggestions = MappingProxyType(dict(suggestions))
        if not set(self.suggestions.values()) <= set(self._entries):
            raise ValueError(
                f"Registry: every suggestion must be the name of a {kind} in the registry."
            )

    def __getitem__(self, name: str) -> _Entry:
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{len(self)} entries, each a {self.kind}: {', '.join(self)}>"

    def find(self, name: str) -> _Entry:
        """Returns the entry with a name.

        Raises:
          ValueError: if no entry has that name. The message suggests the nearest ones.
        """
        if name not in self:
            raise self.unknown(name)
        return self._entries[name]

    def resolve(self, value: str | _Entry, argument: str, method: str = "__call__") -> _Entry:
        """Returns the entry with a name, or the value itself if it can be an entry.

        Args:
          value: a name, or a user-defined entry.
          argument: the name of the argument in error messages.
          method: the method that every entry has.

        Raises:
          ValueError: if no entry has that name.
          TypeError: if the value is neither a name nor an object with the method.
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
            raise TypeError(f"{requirement}, got {type(value).__name__}. {suggestion('', self)}")
        return value

    def name_of(self, entry: object) -> str | None:
        """Returns the first name of an entry, or None if it is not in the registry."""
        return next((name for name, value in self.items() if value == entry), None)

    def near(self, name: str) -> list[str]:
        """Returns up to three names similar to a misspelled one, the most similar first."""
        return _similar(name, self)

    def unknown(self, name: str) -> ValueError:
        """Returns the error for an unknown name, which suggests similar names."""
        return ValueError(f"No {self.kind} is named {name!r:.80}. {suggestion(str(name), self)}")


def suggestion(name: str, *tables: Iterable[str], most: int | None = None) -> str:
    """Returns a sentence for an error about an unknown name, which lists the names to use instead.

    Args:
      name: the unknown name.
      *tables: collections of known names, also registries, whose `suggestions` are used.
      most: the number of names to list if none is similar; None for as many as fit into an error.

    Example:
      >>> suggestion("upp", ["layers/up", "layers/down"])
      'Did you mean layers/up?'
      >>> suggestion("kernel", ["layers/up", "layers/down", "norm"], most=2)
      'Known: layers/up, layers/down and 1 more.'
    """
    near = _similar(name, *tables)
    if near:
        return f"Did you mean {', '.join(near)}?"
    known = [known for table in tables for known in table]
    listed = known[:most]
    if most is None:
        while len(", ".join(listed)) > _LONGEST:
            listed.pop()
    rest = f" and {len(known) - len(listed)} more" if len(known) > len(listed) else ""
    return f"Known: {', '.join(listed) or 'none'}{rest}."


def _similar(name: str, *tables: Iterable[str]) -> list[str]:
    """Returns up to three names: suggestions, then names that start with it, then similar ones.

    Paths are also compared without their first parts.
    """
    spelled = name.lower()
    suggested = [t.suggestions.get(spelled) for t in tables if isinstance(t, Registry)]
    known = list(dict.fromkeys(known for table in tables for known in table))
    ratios = {known_name: _similarity(spelled, known_name) for known_name in known}
    known.sort(key=lambda n: -ratios[n])
    longer = [n for n in known if spelled and n.lower().startswith(spelled)]
    near = [n for n in known if ratios[n] >= 0.5]
    found = dict.fromkeys([*(n for n in suggested if n is not None), *longer, *near])
    return list(found)[:3]


def _similarity(spelled: str, known: str) -> float:
    """Returns the similarity of a lower-case name to a known name or to the end of a path."""
    parts = known.lower().split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return max(difflib.SequenceMatcher(None, end, spelled).ratio() for end in ends)
