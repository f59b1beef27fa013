"""A table in the terminal that shows the worst statistics of a training loop."""

import math
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxq._base.arguments import integer, names_of
from jaxq.analysis._monitoring import STATISTICS, check_names
from jaxq.models import Monitored

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LiveRow", "LiveTable"]

_LOWER_IS_WORSE = ("sqnr_db", "cosine", "smallest", "scale_smallest", "codes_used")
_SCALARS = [name for name in STATISTICS if name not in ("exponents", "product")]


class LiveRow(NamedTuple):
    """A row of a `LiveTable`.

    Attributes:
      statistic: the statistic, such as `"sqnr_db"`.
      tensor: the tensor and its layer, such as `"layers/up/3/lhs"`.
      value: the value in the last step with statistics.
      worst: the worst value since the table was made.
      step: the step of the worst value.

    Example:
      >>> row = LiveRow(
      ...     statistic="sqnr_db", tensor="layers/up/3/lhs", value=31.0, worst=12.0, step=400
      ... )
      >>> f"{row.tensor} fell to {row.worst} dB in step {row.step}."
      'layers/up/3/lhs fell to 12.0 dB in step 400.'
    """

    statistic: str
    tensor: str
    value: float
    worst: float
    step: int


class LiveTable:
    """A table of the worst tensors of a training loop, updated in place in a terminal.

    The rows of a statistic are its worst tensors in the last step with statistics, the worst one
    first; among equal tensors, those that were worse before come first. `"sqnr_db"`, `"cosine"`,
    `"codes_used"` and the smallest magnitudes are worse if they are lower, all others if their
    magnitude is larger. A tensor whose SQNR has always been infinite, or whose statistic has always
    been 0, is not shown. If the output is not a terminal, only the last table is printed, at
    the end of the `with` block. Needs rich (`pip install rich`).

    Args:
      statistics: names of statistics as in `Monitoring`. A string means one of them. Default: the
        SQNR and the fractions that are clipped, flushed to zero or not finite.
      worst: the largest number of rows of each statistic, at least 1. Default: 4.
      console: a `rich.console.Console`. Default: one that writes to the standard output.

    Attributes:
      rows: the rows that are shown, a list of `LiveRow`.

    Raises:
      ImportError: if rich is not installed.
      ValueError: if a statistic is unknown or is a histogram, or `worst` is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq
      >>> loss = lambda params, x: ((x @ params["up"]) ** 2).sum()
      >>> params, x = {"up": jnp.array([[1.0, 0.1], [0.9, 7.0]])}, jnp.ones((1, 2))
      >>> state = jaxq.analysis.monitor(loss, {"up": "int4_tensor"})(params, x)
      >>> step = jax.jit(jax.grad(lambda state: jaxq.quantize_fn(loss, state)(params, x)))
      >>> with LiveTable("flushed") as table:
      ...     for n in range(3):
      ...         table.update(n, step(state))
      step 2...
        statistic   tensor   value   worst   at step...
        flushed     up/rhs    0.25    0.25         0...
      >>> table.rows
      [LiveRow(statistic='flushed', tensor='up/rhs', value=0.25, worst=0.25, step=0)]
    """

    def __init__(
        self,
        statistics: str | Sequence[str] = ("sqnr_db", "clipped", "flushed", "nonfinite"),
        *,
        worst: int = 4,
        console: "Console | None" = None,
    ) -> None:
        try:
            from rich.live import Live
        except ImportError as error:
            raise ImportError("jaxq.analysis.LiveTable needs rich: pip install rich.") from error
        if isinstance(statistics, str):
            statistics = (statistics,)
        self._statistics = names_of("LiveTable", "statistics", statistics)
        check_names("LiveTable", "statistics", self._statistics, _SCALARS)
        integer("LiveTable", "worst", worst, "Use, for example, 8.", least=1)
        self._count = worst
        self._worst: dict[str, tuple[float, int]] = {}
        self._live = Live(console=console, auto_refresh=False)
        self.rows: list[LiveRow] = []

    def __enter__(self) -> "LiveTable":
        """Starts the display."""
        self._live.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the display; the last table remains."""
        self._live.stop()

    def update(self, step: int, seen: Monitored) -> None:
        """Shows the statistics of a step; in a step without statistics, only its number.

        Waits until the step has been computed.

        Args:
          step: the number of the step.
          seen: the gradient with respect to a `Monitored` state.

        Raises:
          ValueError: if `seen` lacks one of the table's statistics.
        """
        values = seen.flat()
        parts = [(name, *name.rpartition("/")[::2], value) for name, value in values.items()]
        for statistic in self._statistics:
            if not any(last == statistic for _, _, last, _ in parts):
                raise ValueError(
                    f"LiveTable: `seen` has no {statistic!r}. Request it with "
                    "Monitoring(statistics=...), or leave it out of the table."
                )
        if any(not math.isnan(value) for value in values.values()):
            self.rows = [
                row
                for statistic in self._statistics
                for row in self._ranked(
                    statistic,
                    int(step),
                    {tensor: (name, v) for name, tensor, last, v in parts if last == statistic},
                )
            ]
        self._live.update(self._table(int(step)), refresh=True)

    def _ranked(
        self, statistic: str, step: int, values: dict[str, tuple[str, float]]
    ) -> list[LiveRow]:
        """Returns the rows of a statistic and records its worst values."""
        rows, harmless = [], math.inf if statistic in _LOWER_IS_WORSE else 0
        for tensor, (name, value) in values.items():
            if math.isnan(value):
                continue
            before = self._worst.get(name)
            if before is None or _severity(statistic, value) > _severity(statistic, before[0]):
                self._worst[name] = value, step
            worst, at = self._worst[name]
            if worst != harmless:
                rows.append(LiveRow(statistic, tensor, value, worst, at))

        def severity(row: LiveRow) -> tuple[float, float]:
            return _severity(statistic, row.value), _severity(statistic, row.worst)

        return sorted(rows, key=severity, reverse=True)[: self._count]

    def _table(self, step: int) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"step {step}", title_justify="left", box=box.SIMPLE_HEAD)
        for head in ("statistic", "tensor", "value", "worst", "at step"):
            left = head in ("statistic", "tensor")
            table.add_column(head, justify="left" if left else "right", overflow="fold")
        for i, row in enumerate(self.rows):
            last = i + 1 == len(self.rows) or self.rows[i + 1].statistic != row.statistic
            cells = (row.statistic, row.tensor, f"{row.value:.4g}", f"{row.worst:.4g}", row.step)
            # `Text` prevents names from being read as markup.
            table.add_row(*(Text(str(cell)) for cell in cells), end_section=last)
        return table


def _severity(statistic: str, value: float) -> float:
    return -value if statistic in _LOWER_IS_WORSE else abs(value)
