"""An append-only log of statistics on disk, which survives a crash."""

import base64
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxq._base.arguments import path as as_path
from jaxq.analysis._steps import GradientError
from jaxq.models import Monitored
from jaxq.recipes import Recipe, title_of

__all__ = ["Log", "LoggedRecipe", "StatisticsLog", "read_log"]

_KIND, _VERSION = "jaxq statistics", 2


class LoggedRecipe(NamedTuple):
    """The recipe of a tensor in a log.

    Attributes:
      name: the name of the recipe, or its format, granularity and other fields.
      largest: the largest value of its element format.
      smallest: the smallest positive value of its element format.

    Example:
      >>> recipe = LoggedRecipe(name="fp8_e4m3_tensor", largest=448.0, smallest=2**-9)
      >>> 224.0 * recipe.smallest / recipe.largest  # The smallest value if the amax is 224.
      0.0009765625
    """

    name: str
    largest: float
    smallest: float


@dataclasses.dataclass(frozen=True)
class Log:
    """The contents of a log.

    Attributes:
      steps: int64 `[steps]`, increasing.
      values: float32 arrays `[steps, ...]` by names such as `"layers/up/lhs/sqnr_db"`; a product in
        a scan over layers has an axis of layers after that of steps. Gradient errors have names
        such as `"layers/up/gradient/cosine"`, and are NaN in steps without them.
      recipes: the recipes of the tensors by names such as `"layers/up/lhs"` and
        `"layers/up/dlhs/cotangent"`; tensors without a recipe are left out.

    Example:
      >>> import numpy as np
      >>> log = Log(np.array([0, 10, 20]), {"up/lhs/sqnr_db": np.float32([31, 12, 30])})
      >>> int(log.steps[log.values["up/lhs/sqnr_db"].argmin()])  # The step with the lowest SQNR.
      10
    """

    steps: np.ndarray
    values: Mapping[str, np.ndarray]
    recipes: Mapping[str, LoggedRecipe] = dataclasses.field(default_factory=dict)


class StatisticsLog:
    """An append-only log of the statistics of a training run.

    The file has one line of JSON with the names of the columns and the recipes of the tensors, and
    one line per step with the exact float32 values. A line that a crash cut off is removed at the
    next opening. If a run resumes at an earlier step, the later record of a step replaces the
    earlier one when the log is read.

    Args:
      path: the file, which the first `append` creates or continues.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq, pathlib, tempfile
      >>> loss = lambda w, x: (x @ w).sum()
      >>> w, x = jnp.eye(2), jnp.ones((1, 2))
      >>> state = jaxq.analysis.monitor(loss, [])(w, x)
      >>> seen = jax.jit(jax.grad(lambda s: jaxq.quantize_fn(loss, s)(w, x)))(state)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     log = StatisticsLog(pathlib.Path(folder) / "run.log")
      ...     log.append(0, seen)
      ...     log.append(10, seen)
      ...     read_log(log.path).values["/lhs/rms"].tolist()
      [1.0, 1.0]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = as_path("StatisticsLog", "path", path)
        self._header: str | None = None

    def append(
        self,
        step: int,
        seen: Monitored,
        *,
        gradients: Mapping[str, GradientError] | None = None,
    ) -> None:
        """Appends the statistics of a step; does nothing in a step without statistics.

        Args:
          step: the number of the step.
          seen: the gradient with respect to a `Monitored` state.
          gradients: the result of `gradient_errors` for this step. If the first step of a log has
            it, later steps may have it or not. Default: None.

        Raises:
          ValueError: if the log has another model, request or version, or other recipes; or
            if `seen` is a state and not a gradient.
        """
        if self._header is None:
            self._header = self._existing()
        values = {
            f"{product}/{name}": np.asarray(value, np.float32)
            for product, statistics in jax.device_get(seen.statistics()).items()
            for name, value in statistics.items()
        }
        if gradients is not None:
            for path, error in jax.device_get(dict(gradients)).items():
                for name, value in error._asdict().items():
                    values[f"{path}/gradient/{name}"] = np.asarray(value, np.float32)
        elif self._header is not None:
            for name, shape in _parsed(self.path, self._header).columns:
                if "/gradient/" in name and name not in values:
                    values[name] = np.full(shape, np.nan, np.float32)
        columns = [[name, list(value.shape)] for name, value in values.items()]
        recipes = {name: _logged(recipe) for name, recipe in seen.recipes.items()}
        header = json.dumps(
            {"kind": _KIND, "version": _VERSION, "columns": columns, "recipes": recipes}
        )
        if self._header is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(header + "\n")
            self._header = header
        if header != self._header:
            raise ValueError(
                f"StatisticsLog.append: `seen` must match the log {self.path.name}, got "
                f"{_difference(_parsed(self.path, self._header), _parsed(self.path, header))}. "
                "Write to a new file."
            )
        seen.check_gradient("StatisticsLog.append")
        if all(_is_empty(name, value) for name, value in values.items()):
            return
        data = np.concatenate([value.reshape(-1) for value in values.values()])
        text = base64.b64encode(data.astype("<f4").tobytes()).decode()
        with self.path.open("a") as file:
            file.write(json.dumps({"step": int(step), "data": text}) + "\n")

    def _existing(self) -> str | None:
        """Removes an incomplete last line of the file; returns its first line, if it has one."""
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(complete))
        if not complete:
            return None
        first = complete.split(b"\n", 1)[0].decode()
        _parsed(self.path, first)
        return first


def _is_empty(name: str, value: np.ndarray) -> bool:
    """Returns whether a statistic is that of a step without statistics: NaN, or no counts."""
    return not value.any() if name.endswith("/exponents") else bool(np.isnan(value).all())


def read_log(path: str | os.PathLike[str]) -> Log:
    """Reads a log that `StatisticsLog` wrote, up to its last complete line.

    Args:
      path: the file.

    Returns:
      The contents of the log, with its steps in ascending order.

    Raises:
      ValueError: if the file is not a log, has another version, or has a damaged line.

    Example:
      >>> import jax, jax.numpy as jnp, jaxq, pathlib, tempfile
      >>> loss = lambda w, x: (x @ w).sum()
      >>> w, x = jnp.eye(2), jnp.ones((1, 2))
      >>> state = jaxq.analysis.monitor(loss, [])(w, x)
      >>> seen = jax.jit(jax.grad(lambda s: jaxq.quantize_fn(loss, s)(w, x)))(state)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "run.log"
      ...     StatisticsLog(path).append(0, seen)
      ...     with path.open("a") as file:  # A crash while step 1 is written.
      ...         size = file.write('{"step": 1')
      ...     read_log(path).steps.tolist()
      [0]
    """
    path = as_path("read_log", "path", path)
    lines = path.read_bytes().split(b"\n")[:-1]
    header = _parsed(path, lines[0].decode(errors="replace") if lines else "")
    columns = header.columns
    sizes = [int(np.prod(shape)) for _, shape in columns]
    rows: dict[int, np.ndarray] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            record = json.loads(line)
            row = np.frombuffer(base64.b64decode(record["data"]), "<f4")
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"read_log: line {number} of {path.name} must be a record of a step, got damaged "
                "data. Delete the line to read the other steps."
            ) from error
        if row.size != sum(sizes):
            raise ValueError(
                f"read_log: line {number} of {path.name} must have {sum(sizes)} numbers, got "
                f"{row.size}. Delete the line to read the other steps."
            )
        rows[step] = row
    steps = np.asarray(sorted(rows), np.int64)
    data = np.stack([rows[step] for step in sorted(rows)]) if rows else np.zeros((0, sum(sizes)))
    parts = np.split(data.astype(np.float32), np.cumsum(sizes)[:-1], axis=1)
    values = {
        name: part.reshape(len(steps), *shape)
        for (name, shape), part in zip(columns, parts, strict=True)
    }
    return Log(steps, values, header.recipes)


class _Header(NamedTuple):
    """The first line of a log: the names and shapes of its columns, and the recipes."""

    columns: list[Any]
    recipes: dict[str, LoggedRecipe]


def _parsed(path: pathlib.Path, header: str) -> _Header:
    """Returns the contents of the first line of a log."""
    try:
        content = json.loads(header)
        kind, version = content["kind"], content["version"]
    except (ValueError, KeyError, TypeError):
        content, kind, version = {}, None, None
    if kind != _KIND:
        raise ValueError(
            f"read_log: {path.name} must be a log of jaxq.analysis.StatisticsLog, got another "
            "file. Pass the path that StatisticsLog wrote."
        )
    if version != _VERSION:
        raise ValueError(
            f"read_log: {path.name} has version {version}, and this jaxq reads {_VERSION}. Read it "
            "with the version that wrote it."
        )
    recipes = {name: LoggedRecipe(*fields) for name, fields in content["recipes"].items()}
    return _Header(content["columns"], recipes)


def _logged(recipe: Recipe) -> LoggedRecipe:
    fmt = recipe.element
    return LoggedRecipe(title_of(recipe), float(fmt.max), float(fmt.min_positive))


def _difference(old: _Header, new: _Header) -> str:
    """Returns the first difference between the contents of a log and what is to be appended."""
    if old.columns != new.columns:
        return f"another model or request: {_short(new)} instead of {_short(old)}"
    for name in {**old.recipes, **new.recipes}:
        before, after = (
            header.recipes[name].name if name in header.recipes else "no recipe"
            for header in (old, new)
        )
        if old.recipes.get(name) != new.recipes.get(name):
            return f"other recipes: {after} for {name} instead of {before}"
    return "another model"


def _short(header: _Header) -> str:
    names = [name for name, _ in header.columns]
    return f"{len(names)} columns from {names[0] if names else 'none'}"
