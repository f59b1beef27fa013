"""Low precision in optimizers: quantized state, quantized gradients, rounded updates, schedules.

Everything is an optax transformation or a pure function on pytrees, and works inside and around
optax's own: `chain`, `masked`, `partition`, `inject_hyperparams`. jaxq loads this package, and with
it optax, at the first use of `jaxq.optim`.
"""

from jaxq.optim.gradients import quantize_gradients
from jaxq.optim.schedules import bits_schedule, quantize_after
from jaxq.optim.state import ADAM8BIT, quantize_state
from jaxq.optim.updates import apply_updates

__all__ = [
    "ADAM8BIT",
    "apply_updates",
    "bits_schedule",
    "quantize_after",
    "quantize_gradients",
    "quantize_state",
]
