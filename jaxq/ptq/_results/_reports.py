"""The reports of `quantize_weights` and `learn_rounding`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxq._base.tables import Table, Tabular

__all__ = ["LearnedBlock", "Report", "RoundingReport", "SolvedProduct"]

_SHOWN = 24  # The number of rows that a long report prints: unsolved ones, then the largest losses.


@dataclasses.dataclass(frozen=True)
class SolvedProduct:
    """One product of a quantized model, in one layer of a scan.

    Attributes:
      product: the name of the product, with the layer in brackets if it is in a scan.
      format: the name of the weight's element format; several, joined by "|", for experts with
        different recipes.
      tokens: the number of tokens; for experts, the smallest number of any expert.
      inputs: the length of the contraction.
      damping: the damping, relative to the mean of the Hessian's diagonal; NaN if none was used.
      rtn: the loss `tr(E^T H E)` of rounding to nearest, relative to `tr(W^T H W)`. NaN if the
        product was not solved, like `loss` and `power`. E is computed in float32, so the losses of
        16-bit weights exclude the conversion of the stored values to 16 bits.
      loss: the same loss of the stored weight. With a solver that corrects the drift of inputs it
        may exceed `rtn`, because it compares with the float weight on the same input.
      power: the power of the outputs per token, `tr(W^T H W) / tokens`.
      unsolved_reason: the reason why the product was not solved, or only partly or without the
        drift of its input; or "".

    Example:
      >>> from jaxq import ptq
      >>> row = ptq.SolvedProduct("w", "int4", tokens=32, inputs=64)
      >>> row.rank, row.note
      (32, 'rank at most 32 of 64')
    """

    product: str
    format: str
    tokens: int = 0
    inputs: int = 0
    damping: float = math.nan
    rtn: float = math.nan
    loss: float = math.nan
    power: float = math.nan
    unsolved_reason: str = ""

    @property
    def rank(self) -> int:
        """The largest possible rank of the Hessian: the number of tokens or of inputs."""
        return min(self.tokens, self.inputs)

    @property
    def note(self) -> str:
        """The note shown in the table: the `unsolved_reason`, or that the Hessian is singular."""
        if self.unsolved_reason or self.rank == self.inputs:
            return self.unsolved_reason
        return f"rank at most {self.rank} of {self.inputs}"


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of the printed table."""

    product: str
    format: str
    tokens: int
    inputs: int
    damping: float
    rtn: float
    loss: float
    note: str


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Tabular):
    """The report of `jaxq.ptq.quantize_weights`. Prints as a table.

    Attributes:
      rows: all products in the order in which they were solved.

    Example:
      >>> from jaxq import ptq
      >>> report = ptq.Report((ptq.SolvedProduct("w", "int4", unsolved_reason="no tokens"),))
      >>> [row.product for row in report.unsolved]
      ['w']
    """

    rows: tuple[SolvedProduct, ...]

    @property
    def unsolved(self) -> tuple[SolvedProduct, ...]:
        """The products that were not solved, or only partly."""
        return tuple(row for row in self.rows if row.unsolved_reason)

    def _table(self) -> Table:
        return Table(tuple(map(_line, self._shown)))

    @property
    def _shown(self) -> Sequence[SolvedProduct]:
        """All products, or those with the largest losses if there are many."""
        worst = sorted(
            self.rows, key=lambda r: (not r.unsolved_reason, -r.loss if r.loss == r.loss else 0.0)
        )
        return self.rows if len(self.rows) <= _SHOWN else worst[:_SHOWN]

    def _notes(self) -> list[str]:
        known = [row for row in self.rows if not math.isnan(row.loss)]
        lines = []
        if len(self._shown) < len(self.rows):
            lines.append(f"... and {len(self.rows) - len(self._shown)} other products")
        if known:
            rtn, loss = (sum(getattr(r, name) for r in known) / len(known) for name in _LOSSES)
            lines.append(f"mean loss of {len(known)} products: {loss:.4g}, to nearest: {rtn:.4g}")
        if self.unsolved:
            lines.append(
                f"{len(self.unsolved)} products were not solved, or only partly; see `note`"
            )
        return lines


_LOSSES = ("rtn", "loss")


def _line(row: Any, line_type: Any = _Line) -> Any:
    """Returns the line of a row, which has all fields of the line."""
    values = (getattr(row, field.name) for field in dataclasses.fields(line_type))
    return line_type(*values)


@dataclasses.dataclass(frozen=True)
class LearnedBlock:
    """The progress or the result of one block.

    Without validation, the best weights are those with the least `loss`; with it, those with the
    least `validation_loss`.

    Attributes:
      block: the index of the block.
      step: the number of steps so far; in a report, the step at which the best weights were found.
      rtn: the squared error of the block's outputs with rounding to nearest, relative to the power
        of the float outputs.
      loss: the same error with the best weights so far.
      weights: the number of leaves whose rounding is learned.
      validation_rtn: the error `rtn` on the batches for validation, or None if there are none.
      validation_loss: the error `loss` on the batches for validation, or None if there are none.
      note: the weights that the rules quantize but that are not stored, with the reasons; or "".

    Example:
      >>> from jaxq import ptq
      >>> block = ptq.LearnedBlock(block=0, step=200, rtn=0.02, loss=0.01, weights=3)
      >>> block.loss < block.rtn
      True
    """

    block: int
    step: int
    rtn: float
    loss: float
    weights: int
    validation_rtn: float | None = None
    validation_loss: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _BlockLine:
    """A line of the printed table without validation."""

    block: int
    step: int
    rtn: float
    loss: float
    weights: int
    note: str


@dataclasses.dataclass(frozen=True, repr=False)
class RoundingReport(Tabular):
    """The report of `jaxq.ptq.learn_rounding`. Prints as a table.

    Attributes:
      rows: the blocks, in order.

    Example:
      >>> from jaxq import ptq
      >>> row = ptq.LearnedBlock(block=0, step=200, rtn=0.02, loss=0.01, weights=3)
      >>> ptq.RoundingReport((row,)).rows[0].step
      200
    """

    rows: tuple[LearnedBlock, ...]

    def _table(self) -> Table:
        if any(row.validation_loss is not None for row in self.rows):
            return Table(self.rows)
        return Table(tuple(_line(row, _BlockLine) for row in self.rows))
