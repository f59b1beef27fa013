"""Low precision in optimizers: quantized state, quantized gradients, rounded updates, schedules.

Every function is or returns an optax transformation or a pure function on pytrees, and composes
with optax's `chain`, `masked`, `partition` and `inject_hyperparams`. jaxq imports this package, and
with it optax, at the first use of `jaxq.optim`.

`quantize_state` stores state by any recipe, so a new format for state is a recipe of
`jaxq.recipes`; to change how an array of state maps to blocks, edit `_state.py`.
"""

from jaxq.optim._gradients import quantize_gradients
from jaxq.optim._schedules import bits_schedule, quantize_after
from jaxq.optim._state import ADAM8BIT, SECOND_MOMENTS, Flattened, Squared, quantize_state
from jaxq.optim._updates import apply_updates

__all__ = [
    "ADAM8BIT",
    "SECOND_MOMENTS",
    "apply_updates",
    "bits_schedule",
    "quantize_after",
    "quantize_gradients",
    "quantize_state",
]
