"""Greedy placement of labels without overlap.

Each label tries positions around its point, near ones first, and takes the one that overlaps least
with other labels, points, lines and the edge of the axes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation, Text

__all__ = ["annotate", "heads", "place"]

_SWEEPS = 3  # The first sweep places labels; the others improve positions once all are placed.
_ANGLES = (0.25, 0.0, -0.25, 1.0, 0.75, -0.75, 0.5, -0.5, 0.125, -0.125, 0.875, -0.875)


def place(
    points: np.ndarray,
    sizes: np.ndarray,
    bounds: Sequence[float] | np.ndarray,
    *,
    obstacles: np.ndarray | None = None,
    line: np.ndarray | None = None,
    radius: float = 6.0,
) -> np.ndarray:
    """Returns label positions that avoid other labels and points.

    Crowded points choose first. The cost of a position is the area that it shares with what is
    already placed, weighted most for labels and for area outside the bounds, plus a small cost for
    the distance to its point.

    Args:
      points: the points, `[n, 2]`, in pixels.
      sizes: the widths and heights of the labels, `[n, 2]`, in pixels.
      bounds: the left, bottom, right and top limits for labels.
      obstacles: boxes to avoid, `[m, 4]` (left, bottom, right, top).
      line: the corners of a line that labels should not cross, `[m, 2]`.
      radius: the radius of a point's marker.

    Returns:
      The centers of the labels, `[n, 2]`.

    Example:
      >>> centers = place(np.zeros((2, 2)), np.full((2, 2), 10.0), (-50, -50, 50, 50))
      >>> bool(np.abs(centers[0] - centers[1]).max() >= 10)
      True
    """
    points, sizes = np.asarray(points, float), np.asarray(sizes, float)
    n = len(points)
    marks = np.concatenate([points - radius, points + radius], axis=1)
    if line is not None:
        dots = _points_along(np.asarray(line, float))
        marks = np.concatenate([marks, np.concatenate([dots - 2, dots + 2], axis=1)])
    fixed = np.zeros((0, 4)) if obstacles is None else np.asarray(obstacles, float).reshape(-1, 4)
    left, bottom, right, top = bounds
    distance = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1))
    crowd = (distance < 120).sum(1)
    order = sorted(range(n), key=lambda i: (-crowd[i], *points[i]))
    centers, taken = np.zeros((n, 2)), np.full((n, 4), np.inf)  # Overlaps nothing.
    for i in order * _SWEEPS:
        candidates = _candidates(points[i], sizes[i], radius)
        boxes = np.concatenate(
            [candidates - sizes[i] / 2 - 1, candidates + sizes[i] / 2 + 1], axis=1
        )
        outside = np.maximum(0, left - boxes[:, 0]) + np.maximum(0, boxes[:, 2] - right)
        outside += np.maximum(0, bottom - boxes[:, 1]) + np.maximum(0, boxes[:, 3] - top)
        others = np.concatenate([fixed, np.delete(taken, i, axis=0)])
        cost = 1000 * outside + 40 * _shared(boxes, others) + 8 * _shared(boxes, marks)
        away = np.maximum(np.abs(candidates - points[i]) - sizes[i] / 2, 0)
        cost += 0.05 * np.hypot(*away.T) ** 2 + 0.002 * np.hypot(*(candidates - points[i]).T) ** 2
        best = int(np.argmin(cost))
        centers[i], taken[i] = candidates[best], boxes[best]
    return centers


def _points_along(line: np.ndarray) -> np.ndarray:
    """Returns closely spaced points along a line."""
    parts = [
        a + np.linspace(0, 1, max(2, int(np.abs(b - a).max() / 5)))[:, None] * (b - a)
        for a, b in itertools.pairwise(line)
    ]
    return np.concatenate([*parts, line])


def _candidates(point: np.ndarray, size: np.ndarray, radius: float) -> np.ndarray:
    """Returns candidate label centers around a point, in rings of increasing distance."""
    candidates = []
    for ring in range(12):
        gap = radius + 2 + 9 * ring
        for turn in _ANGLES:
            x, y = math.cos(math.pi * turn), math.sin(math.pi * turn)
            candidates.append(point + np.array([x, y]) * (gap + size / 2))
    return np.array(candidates)


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the total area that each box shares with all others."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), axis=2).sum(1)


def annotate(
    axes: "Axes",
    points: np.ndarray,
    labels: Sequence[str],
    *,
    colors: Sequence[str] | str = "#333333",
    fontsize: float = 8,
    line: np.ndarray | None = None,
    **text: Any,
) -> "list[Annotation]":
    """Labels the points of finished axes without overlap.

    The layout is computed first and then frozen, because the positions depend on it. A thin line
    joins a label to its point if they are far apart.

    Args:
      axes: the axes, with final limits and scales.
      points: the points, `[n, 2]`, in data coordinates.
      labels: one label per point; empty ones are skipped.
      colors: one color for all labels, or one per label.
      fontsize: the font size in points. Default: 8.
      line: the corners of a line that labels should not cross, `[m, 2]`, in data coordinates.
      **text: further arguments of `Axes.annotate`.

    Returns:
      The annotations.
    """
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    pixels = axes.transData.transform(np.asarray(points, float))
    labeled = [i for i, label in enumerate(labels) if label]
    colors = [colors] * len(labels) if isinstance(colors, str) else colors
    notes, sizes = [], []
    for i in labeled:
        note = axes.annotate(
            labels[i],
            points[i],
            (0, 0),
            textcoords="offset points",
            fontsize=fontsize,
            color=colors[i],
            ha="center",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6},
            **text,
        )
        notes.append(note)
        sizes.append(_size(note))
    if not notes:
        return notes
    legend = axes.get_legend()
    boxes = [] if legend is None else [legend.get_window_extent().extents]
    boxes += [other.get_window_extent().extents for other in axes.texts if other not in notes]
    others = np.delete(pixels, labeled, axis=0)
    boxes += [[x - 3, y - 3, x + 3, y + 3] for x, y in others]
    centers = place(
        pixels[labeled],
        np.array(sizes),
        axes.get_window_extent().extents,
        obstacles=np.array(boxes).reshape(-1, 4),
        line=None if line is None else axes.transData.transform(line),
    )
    for note, center, point, (width, height) in zip(
        notes, centers, pixels[labeled], sizes, strict=True
    ):
        offset = (center - point) * 72 / figure.dpi
        note.set_position(tuple(offset))
        away = np.maximum(np.abs(center - point) - (width / 2, height / 2), 0)
        if note.arrow_patch is not None:
            note.arrow_patch.set_visible(bool(np.hypot(*away) > 14))
    return notes


def _size(note: "Annotation") -> tuple[float, float]:
    """Returns the width and height of a label's text, without its arrow, in pixels."""
    from matplotlib.text import Text

    box = Text.get_window_extent(note)
    return box.width, box.height


def heads(
    axes: "Axes", places: Sequence[float], names: Sequence[str], *, color: str, gap: float = 18
) -> "list[Text]":
    """Draws slanted names above axes, each joined by a line to its position on the axis.

    Names of close positions are moved to the right to keep a minimum distance.

    Args:
      axes: the axes, with final limits and scale.
      places: the positions in ascending order, in data coordinates.
      names: one name per position.
      color: the color of the names and lines.
      gap: the least distance between two names, in pixels at the figure's resolution.

    Returns:
      The texts.
    """
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    points = np.array([[place, 0.0] for place in places]).reshape(-1, 2)
    shares = axes.transAxes.inverted().transform(axes.get_xaxis_transform().transform(points))[:, 0]
    least, last, texts = gap / axes.get_window_extent().width, -np.inf, []
    for share, name in zip(shares, names, strict=True):
        last = max(float(share), last + least)
        axes.plot(
            [share, last],
            [1, 1.04],
            color=color,
            linewidth=0.8,
            transform=axes.transAxes,
            clip_on=False,
        )
        text = axes.text(
            last,
            1.05,
            name,
            transform=axes.transAxes,
            rotation=40,
            rotation_mode="anchor",
            fontsize=8,
            color=color,
            ha="left",
            va="center",
        )
        texts.append(text)
    return texts
