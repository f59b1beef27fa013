"""The configuration of a checkpoint's quantization, from the JSON files beside its tensors."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxq.interop._entries import FileError

__all__ = ["Config", "config_beside", "read_json"]

_LARGEST = 2**24  # The largest size of a file in bytes.
_AGAIN = "Download it again."


class Config(NamedTuple):
    """The configuration of the quantization of a checkpoint.

    Attributes:
      method: the name of the method; None if no file names one.
      fields: its fields.
      path: the file that names it.
    """

    method: str | None = None
    fields: Mapping[str, Any] = {}
    path: pathlib.Path | None = None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      FileError: if the file is too large, or contains no JSON object.
    """
    try:
        size = path.stat().st_size
        content = json.loads(path.read_bytes()) if size <= _LARGEST else None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not a valid JSON file: {error}. {_AGAIN}") from error
    if size > _LARGEST:
        raise FileError(
            f"{path}: a configuration must have at most {_LARGEST} bytes, got {size}. {_AGAIN}"
        )
    if not isinstance(content, dict):
        raise FileError(
            f"{path}: it must contain a JSON object, got {type(content).__name__}. {_AGAIN}"
        )
    return content


def config_beside(folder: pathlib.Path) -> Config:
    """Returns the configuration in a folder; an empty one if it has none.

    Raises:
      FileError: if a file is damaged, or names no method.
    """
    path = folder / "config.json"
    if path.is_file():
        config = read_json(path)
        inner = config.get("text_config")
        for part in (config, inner if isinstance(inner, dict) else {}):
            fields = part.get("quantization")  # MLX also writes it as quantization_config.
            if isinstance(fields, dict) and "bits" in fields:
                return Config("mlx", fields, path)
            fields = part.get("quantization_config")
            if isinstance(fields, dict):
                method = fields.get("quant_method")
                if method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
                    method = "bitsandbytes"
                if not isinstance(method, str):
                    raise FileError(
                        f"{path}: its `quantization_config` must have a `quant_method`, got no "
                        "quant_method. Add it."
                    )
                return Config(method, fields, path)
    path = folder / "quantize_config.json"
    if path.is_file():
        fields = read_json(path)
        return Config(str(fields.get("quant_method", "gptq")), fields, path)
    path = folder / "hf_quant_config.json"
    if path.is_file():
        fields = read_json(path).get("quantization")
        if not isinstance(fields, dict):
            raise FileError(
                f"{path}: it must have a table `quantization`, got {fields!r:.40}. {_AGAIN}"
            )
        return Config("modelopt", fields, path) if fields.get("quant_algo") else Config()
    return Config()
