"""Rules that hold arrays: scales from calibration, amax histories, or switches. All are pytrees."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxq._base.arguments import integer
from jaxq._base.records import state_repr
from jaxq._base.registry import suggestion
from jaxq._jax.serialization import pytree
from jaxq.models._rules._rule import Rule, check_pattern, rule_records
from jaxq.products import History
from jaxq.quantizers.calibration import Calibrated

__all__ = ["Delayed", "Frozen", "Switch", "Switched", "refuse_states"]


@pytree(static=("rules",), kinds=rule_records)
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Rules with scales from calibration, from `jaxq.freeze`. A pytree.

    Attributes:
      rules: the rules.
      scales: a mapping from product names to the result of `jaxq.calibration.finalize` for each of
        both operands.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> model = lambda params, x: x @ params["w"]
      >>> params, rules = {"w": jnp.eye(2)}, jaxq.ProductRecipe("int8_tensor", "int8_channel")
      >>> _, state = jaxq.observe(model, rules)(params, jnp.array([[1.0, -2.54]]))
      >>> jaxq.freeze(rules, state).scales["w"][1] is None  # The weight's scales are computed.
      True
    """

    rules: tuple[Rule, ...]
    scales: Mapping[str, tuple[Calibrated | None, ...]]

    def __repr__(self) -> str:
        return state_repr(self, self.scales)


@pytree(static=("rules",), kinds=rule_records)
@dataclasses.dataclass(frozen=True)
class Delayed:
    """Rules with delayed scaling, from `jaxq.delayed_scaling`. A pytree.

    Attributes:
      rules: the rules.
      histories: a mapping from product names to the histories of both operands and the cotangent,
        None where no recipe has one scale per tensor. Products in a scan over layers have a
        leading axis, one history per layer.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> loss = lambda params, x: (x @ params["w"]).sum()
      >>> params, x = {"w": jnp.eye(2)}, jnp.ones((1, 2))
      >>> state = jaxq.delayed_scaling(loss, "fp8_training", history=4)(params, x)
      >>> [history.amax.shape for history in state.histories["w"]]
      [(4,), (4,), (4,)]
    """

    rules: tuple[Rule, ...]
    histories: Mapping[str, tuple[History | None, ...]]

    def __repr__(self) -> str:
        return state_repr(self, self.histories)

    def update(self, seen: "Delayed") -> "Delayed":
        """Returns the state for the next step.

        Args:
          seen: the gradient with respect to this state: the amax values of this step.
        """

        def shift(history: jax.Array, seen: jax.Array) -> jax.Array:
            return jnp.concatenate([seen[..., :1], history[..., :-1]], -1)

        return jax.tree.map(shift, self, seen)

    def copies(self, count: int) -> tuple["Delayed", ...]:
        """Returns copies of the state for several calls in one loss, one per call.

        Autodiff adds the observations of calls that share a state. The gradient through copies is
        instead the largest magnitude that any of them has observed.

        Args:
          count: the number of copies, at least 1.

        Raises:
          ValueError: if `count` is less than 1.

        Example:
          >>> import jax, jax.numpy as jnp, jaxq
          >>> fn = lambda w, x: (x @ w).sum()
          >>> w, x = jnp.eye(2), jnp.full((1, 2), 3.0)
          >>> state = jaxq.delayed_scaling(fn, [("", "fp8_training")], history=1)(w, x)
          >>> def loss(w, state):
          ...     online, target = state.copies(2)
          ...     first = jaxq.quantize_fn(fn, online)(w, x)
          ...     return first + jaxq.quantize_fn(fn, target)(w, 2 * x)
          >>> jax.grad(loss, argnums=1)(w, state).histories[""][0].amax
          Array([6.], dtype=float32)
        """
        integer("Delayed.copies", "count", count, "Use one per call.", least=1)
        copies = jax.tree.map(lambda h: h.copies_for_loop(count), self, is_leaf=_is_history)
        return tuple(jax.tree.map(lambda amax, i=i: amax[i], copies) for i in range(count))

    def merge(self, other: "Delayed") -> "Delayed":
        """Merges two micro-batches of one step by taking the larger of their amax values.

        Args:
          other: the gradient with respect to the same state, from another micro-batch.
        """
        return jax.tree.map(jnp.maximum, self, other)

    def gather(self, axis_name: str) -> "Delayed":
        """Merges the amax values of all devices along an axis of `jax.shard_map` or `jax.vmap`."""
        return jax.tree.map(lambda seen: lax.pmax(seen, axis_name), self)


def refuse_states(owner: str, params: Any) -> None:
    """Raises a ValueError if a tree of parameters contains a state of delayed scaling."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Delayed))
    if any(isinstance(leaf, Delayed) for leaf in leaves):
        raise ValueError(
            f"{owner}: the parameters must not contain the state of delayed scaling, because an "
            "optimizer would average its amax values. Differentiate with argnums=(0, 1), update "
            "only the parameters with the optimizer, and the state with state.update(seen)."
        )


def _is_history(x: Any) -> bool:
    return isinstance(x, History)


@pytree()
@dataclasses.dataclass(frozen=True)
class Switch:
    """A flag that turns the recipe of one product on or off. A pytree.

    Attributes:
      on: float32 `[...]`; 0 computes the product in float.
    """

    on: jax.Array

    def copies_for_loop(self, count: int) -> "Switch":
        """Copies the switch for `count` products."""
        return Switch(jnp.broadcast_to(self.on, (count, *self.on.shape)))


@pytree(static=("rules",), kinds=rule_records)
@dataclasses.dataclass(frozen=True)
class Switched:
    """Rules whose recipes can be turned off by traced flags, from `jaxq.models.switch`.

    A pytree. A product whose recipe is off is computed in float, at the cost of a float product.

    Attributes:
      rules: the rules.
      switches: the flags by the products' names. Products in a scan over layers have a leading
        axis, one flag per layer.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> loss = lambda params, x: (x @ params["w"]).sum()
      >>> params, x = {"w": jnp.eye(2)}, jnp.ones((1, 2))
      >>> rules = jaxq.models.switch(loss, "w8a8")(params, x)
      >>> float(rules.where("w", False).switches["w"].on)
      0.0
    """

    rules: tuple[Rule, ...]
    switches: Mapping[str, Switch]

    def __repr__(self) -> str:
        return state_repr(self, self.switches)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the flags: those of the products, followed by the number of the layer."""
        names: list[str] = []
        for name, switch in self.switches.items():
            rows = np.ndindex(switch.on.shape)
            names += ["/".join([name, *map(str, row)]) for row in rows]
        return tuple(names)

    def where(self, pattern: str, on: jax.typing.ArrayLike) -> "Switched":
        """Returns the rules with new flags for some products, in all of their layers.

        Args:
          pattern: a regular expression; a product's flag changes if it is found in its name.
          on: a boolean scalar, which may be traced, such as `step < 1000`.

        Raises:
          ValueError: if the pattern matches no product with a recipe.
        """
        check_pattern("Switched.where", "pattern", pattern)
        matches = [name for name in self.switches if re.search(pattern, name)]
        if not matches:
            raise ValueError(
                f"Switched.where: `pattern` {pattern!r} matches no product with a recipe. "
                f"{suggestion(pattern, self.switches, most=3)}"
            )
        value = jnp.asarray(on).astype(jnp.float32)
        if value.ndim:
            raise ValueError(
                f"Switched.where: `on` must be a scalar, got the shape {value.shape}. Use "
                "`with_flags` for one flag per layer."
            )
        new = {name: Switch(jnp.full(self.switches[name].on.shape, value)) for name in matches}
        return dataclasses.replace(self, switches={**self.switches, **new})

    def with_flags(self, on: jax.typing.ArrayLike) -> "Switched":
        """Returns the rules with new flags for all products and layers.

        Args:
          on: a vector of numbers or booleans in the order of `names`; 0 turns a recipe off.

        Raises:
          ValueError: if the vector does not have one number per name.
        """
        flags, switches, start = jnp.asarray(on).astype(jnp.float32), {}, 0
        if flags.shape != (len(self.names),):
            raise ValueError(
                f"Switched.with_flags: `on` must have one number per name, {len(self.names)}, got "
                f"the shape {flags.shape}. Pass a vector in the order of `names`."
            )
        for name, switch in self.switches.items():
            count = switch.on.size
            switches[name] = Switch(flags[start : start + count].reshape(switch.on.shape))
            start += count
        return dataclasses.replace(self, switches=switches)
