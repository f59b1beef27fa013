"""The layouts of quantized weights in checkpoints of other programs.

`combine_weights` recognizes them. To add a layout, write a function from a `Source` to the
`StoredWeight`s of its checkpoint, and list it in `METHODS`.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxq._base.registry import Registry
from jaxq.interop._entries import Entry, FileError
from jaxq.interop._layouts._bits import as_bytes, pack_bits
from jaxq.interop._layouts._bitsandbytes import bitsandbytes
from jaxq.interop._layouts._compressed import compressed_tensors
from jaxq.interop._layouts._configs import Config, config_beside, read_json
from jaxq.interop._layouts._floats import fp8, gpt_oss, modelopt
from jaxq.interop._layouts._gptq import awq, gptq
from jaxq.interop._layouts._mlx import mlx
from jaxq.interop._layouts._weights import Source, StoredWeight, as_codes, build_quantized

__all__ = [
    "METHODS",
    "Config",
    "StoredWeight",
    "as_bytes",
    "as_codes",
    "build_quantized",
    "combine_weights",
    "config_beside",
    "pack_bits",
    "read_json",
]

_Method = Callable[[Source], dict[str, StoredWeight]]

METHODS: Registry[_Method] = Registry(
    "quantization method",
    {
        "awq": awq,
        "bitsandbytes": bitsandbytes,
        "compressed-tensors": compressed_tensors,
        "fp8": fp8,
        "gptq": gptq,
        "mlx": mlx,
        "modelopt": modelopt,
        "modelopt_fp4": modelopt,
        "mxfp4": gpt_oss,
    },
)

# Endings of names that show a method where no configuration does.
_SIGNS = {
    ".weight_scale_inv": "fp8",
    "_proj_blocks": "mxfp4",
    ".weight_scale_2": "modelopt",
    ".SCB": "bitsandbytes",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
}
# Endings of names of tensors that cannot be read without a configuration.
_NEED_CONFIG = (".qweight", ".weight_packed")


def combine_weights(
    entries: Sequence[Entry], config: Config, raw: Callable[[Entry], np.ndarray]
) -> tuple[Entry, ...]:
    """Combines the tensors that store one quantized weight into one entry.

    The caller adds to its errors that the tensors can be read as they are stored.

    Args:
      entries: the tensors as they are stored.
      config: the configuration of the quantization.
      raw: a function that reads a tensor.

    Raises:
      FileError: if the method is unknown, or tensors do not fit together.
    """
    method = config.method
    if method is None:
        names = [entry.name for entry in entries]
        signs = [sign for sign in _SIGNS if any(name.endswith(sign) for name in names)]
        if not signs:
            unreadable = [name for name in names if name.endswith(_NEED_CONFIG)]
            if unreadable:
                raise FileError(
                    f"{unreadable[0]!r:.120} is part of a quantized weight, but there is no "
                    "config.json with a quantization_config. Download config.json too."
                )
            return tuple(entries)
        method = _SIGNS[signs[0]]
    if method not in METHODS:
        raise FileError(
            f"{config.path}: the quantization method {method!r:.40} is not supported; "
            f"{', '.join(METHODS)} are."
        )
    by_name = {entry.name: entry for entry in entries}
    weights = METHODS[method](Source(by_name, config.fields, raw))
    heads: dict[str, Entry] = {}  # By the name of the first part.
    used: dict[str, str] = {}  # The weight to which each part belongs.
    for name, weight in weights.items():
        parts = [part.name for part in weight.parts.values()]
        shared = next((part for part in parts if part in used), None)
        if shared is not None:
            raise FileError(
                f"tensor {shared!r:.80} belongs to two weights, {used[shared]!r:.80} and "
                f"{name!r:.80}."
            )
        if name in by_name and name not in parts:
            raise FileError(
                f"weight {name!r:.80} is stored both as a tensor and as quantized parts, such as "
                f"{parts[0]!r:.80}."
            )
        used |= dict.fromkeys(parts, name)
        heads[parts[0]] = weight.entry(name)
    return tuple(
        heads.get(entry.name, entry)
        for entry in entries
        if entry.name in heads or entry.name not in used
    )
