"""The command `jaxq report`: a page with pictures of the statistics of a training run."""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxq.analysis import Log, plots, read_log
from jaxq.cli._output import UsageError, atomic, bad_input, number, print_table
from jaxq.cli._page import escaped, page, picture, table

__all__ = ["run"]

_ELEMENTS = ("lhs", "rhs", "output", "cotangent")
_QUANTIZED = ("lhs", "rhs", "output", "dlhs/cotangent", "drhs/cotangent")
_MAPS = {
    "sqnr_db": "signal to quantization noise",
    "clipped": "the fraction that is clipped",
    "flushed": "the fraction that is flushed to zero",
    "nonfinite": "the fraction that is NaN or infinite",
}


class _Worst(NamedTuple):
    """The worst value of a statistic over a run."""

    statistic: str
    tensor: str
    step: int
    value: float


def run(args: argparse.Namespace) -> None:
    """Prints the worst values of a log, and writes a page with pictures."""
    try:
        log = read_log(args.log)
    except OSError as error:
        raise UsageError(f"{args.log}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    worst = [row for statistic in _MAPS for row in _worst(log, statistic, args.worst)]
    print_table(
        [{**w._asdict(), "value": number(w.value, 4)} for w in worst], left=["statistic", "tensor"]
    )
    if args.output is not None:
        with bad_input():
            text = _page(args.log, log, worst, args.format)
        with atomic(args.output, "w") as file:
            file.write(text)


def _worst(log: Log, statistic: str, count: int) -> Iterator[_Worst]:
    """Yields the worst tensors of a statistic, each at its worst step."""
    rows = []
    for name, values in log.values.items():
        path, _, last = name.rpartition("/")
        if last != statistic or not len(log.steps):
            continue
        columns = values.reshape(len(log.steps), -1)
        for i in range(columns.shape[1]):
            column = columns[:, i]
            if np.isnan(column).all():
                continue
            at = int(np.nanargmin(column) if statistic == "sqnr_db" else np.nanargmax(column))
            where = path if values.ndim == 1 else f"{path} [{i}]"
            rows.append(_Worst(statistic, where, int(log.steps[at]), float(column[at])))
    sign = 1 if statistic == "sqnr_db" else -1
    yield from sorted(rows, key=lambda w: sign * w.value)[:count]


def _page(name: str, log: Log, worst: list[_Worst], fmt: str | None) -> str:
    lines = [[escaped(w.tensor), w.statistic, str(w.step), number(w.value, 4)] for w in worst]
    parts = [
        f"<p>{len(log.steps)} steps, {len(log.values)} statistics.</p>",
        "<h2>The worst tensors, each at its worst step</h2>",
        table(["tensor", "statistic", "step", "value"], lines),
    ]
    names = {column.rpartition("/")[2] for column in log.values}
    for statistic, caption in _MAPS.items():
        if statistic in names and len(log.steps):
            data = plots.image(plots.statistics_map(log, statistic), "png")
            parts.append(picture(data, "png", caption))
    if any(column.endswith("/gradient/cosine") for column in log.values) and len(log.steps):
        data = plots.image(plots.gradient_cosines(log), "png")
        parts.append(picture(data, "png", "Cosine of the quantized to the float gradient"))
    parts += _magnitudes(log, fmt)
    for column in log.values:
        tensor, _, last = column.rpartition("/")
        if last == "exponents" and len(log.steps):
            data = plots.image(plots.exponents_by_step(log, tensor, fmt), "png")
            parts.append(picture(data, "png", f"Exponents of {tensor}"))
    return page(f"jaxq report {name}", parts)


def _magnitudes(log: Log, fmt: str | None) -> Iterator[str]:
    """Yields the pictures of magnitudes and of scales."""
    if not len(log.steps):
        return
    kinds = (("amax", _ELEMENTS, False), ("scale_amax", _QUANTIZED, True))
    for statistic, tensors, scales in kinds:
        for tensor in tensors:
            if any(column.endswith(f"/{tensor}/{statistic}") for column in log.values):
                drawn_format = None if scales else fmt
                figure = plots.magnitudes_by_step(log, tensor, drawn_format, scales=scales)
                title = f"{'Scales' if scales else 'Magnitudes'} of {tensor}"
                yield picture(plots.image(figure, "png"), "png", title)
