"""From a tensor's bytes to a torch tensor."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import torch

_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def decode(encoded: npt.NDArray[np.uint8], dtype: str) -> torch.Tensor:
    """`encoded` [rows, bytes] holds whole blocks of `dtype` -> [rows, elements].

    Those of `_PLAIN` share the array's memory; quantised types come out as float32.
    """
    if dtype in _PLAIN:
        return torch.from_numpy(encoded).view(_PLAIN[dtype])
    values = gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[dtype])
    return torch.from_numpy(values)
