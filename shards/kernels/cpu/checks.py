"""What the linear kernels ask of the buffers that they are given."""

from __future__ import annotations

import torch


def check_rows(name: str, buffer: torch.Tensor, width: int) -> None:
    """Raises `ValueError` unless `buffer` is float32 [rows, width], each row contiguous; it may be
    columns of a wider one."""
    if buffer.dtype != torch.float32 or buffer.shape[1:] != (width,) or buffer.stride(-1) != 1:
        raise ValueError(
            f"{name} {list(buffer.shape)} of {buffer.dtype}, strides {buffer.stride()}: must be "
            f"[rows, {width}] of float32, each row contiguous"
        )


def check_pair(
    x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, *, inputs: int, outputs: int
) -> None:
    """Raises `ValueError` where the buffers of a linear layer do not fit it or each other."""
    check_rows("x", x, inputs)
    check_rows("y", y, outputs)
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows, y {len(y)}: they must have as many")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias {list(bias.shape)} does not fit {outputs} outputs")
