"""The progress bar, and the estimated time remaining."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxq.cli._output import safe

__all__ = ["Pace", "progress"]

_COMPILATION = "/jax/core/compile/"  # Events with the durations of tracing and compilation.
_NESTED = "jaxpr_trace_duration"  # The time of one trace is in that of the next.


class Pace:
    """The rate of work, without the time that JAX spends on compilation.

    Attributes:
      total: the sum of all work, in any unit that is proportional to its time.
      done: the work that is done.
    """

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, 0.0
        self._clock, self._start = clock, clock()

    def exclude(self, seconds: float) -> None:
        """Excludes seconds from the time that the work has taken."""
        self._start += seconds

    def advance(self, work: float) -> None:
        """Adds finished work."""
        self.done += work

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds remaining, at the rate so far; None before any work is done."""
        if self.done <= 0:
            return None
        return max(self._clock() - self._start, 0.0) / self.done * (self.total - self.done)


@contextlib.contextmanager
def _excluding_compilation(pace: Pace) -> Iterator[None]:
    """Excludes compilations inside the context from a pace."""

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs
        if event.startswith(_COMPILATION) and not event.endswith(_NESTED):
            pace.exclude(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def progress(title: str, total: float) -> Iterator[Callable[..., None]]:
    """Yields `advance(work, title)`, which moves a bar on a terminal if rich is installed.

    Args:
      title: the text beside the bar, until a call of `advance` passes another one.
      total: the sum of all work.
    """
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    except ImportError:
        yield lambda *_: None
        return
    console, pace = Console(stderr=True), Pace(total)
    columns = ["[progress.description]{task.description}", BarColumn(), TaskProgressColumn()]
    columns.append(TextColumn("[progress.remaining]{task.fields[left]}"))
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar, _excluding_compilation(pace):
        task = bar.add_task(title, total=total, left="")

        def advance(work: float, title: str | None = None) -> None:
            pace.advance(work)
            text = None if title is None else escape(safe(title))
            bar.update(task, advance=work, description=text, left=_time(pace.seconds_left))

        yield advance


def _time(seconds: float | None) -> str:
    """Returns a duration as text, such as `1:02:03` or `2:03`."""
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
