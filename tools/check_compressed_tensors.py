"""Reads a folder with the compressed-tensors package, and compares its weights with given values.

Run it with a Python that has compressed-tensors 0.20 and PyTorch:
`python tools/check_compressed_tensors.py FOLDER VALUES.npz`. It exits with an error if
`config.json` is invalid or a weight differs by more than 2 units in the last place.
"""

# pyright: reportMissingImports=false

import json
import pathlib
import sys

import numpy as np


def main(folder: pathlib.Path, values: pathlib.Path) -> None:
    """Compares all weights in `values`, and prints their number."""
    import safetensors.torch
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    text = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(text)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    with np.load(values) as wanted:
        for name in wanted.files:
            module = name.removesuffix(".weight")
            scheme = next(
                group
                for group in config.config_groups.values()
                if module in group.targets or "Linear" in group.targets
            )
            state = {
                key.removeprefix(f"{module}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{module}.")
            }
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            expected = set(compressor.compression_param_names(scheme)) - {"weight_g_idx"}
            assert expected <= set(state), (name, expected, set(state))
            if "weight_global_scale" in state:  # The compressor computes in bfloat16.
                rows, columns = state["weight_packed"].shape
                value = dequantize(
                    unpack_fp4_from_uint8(state["weight_packed"], rows, 2 * columns, torch.float32),
                    state["weight_scale"].float(),
                    args=scheme.weights,
                    global_scale=state["weight_global_scale"],
                    dtype=torch.float32,
                )
            else:
                if state["weight_scale"].dtype in (torch.bfloat16, torch.float16):
                    state["weight_scale"] = state["weight_scale"].float()
                value = compressor.decompress(state, scheme)["weight"].float()
            np.testing.assert_array_max_ulp(value.numpy(), wanted[name], 2)
        print(f"{len(wanted.files)} weights agree")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
