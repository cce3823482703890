"""Whether a device can do what it is asked to, before anything is loaded onto it."""

from __future__ import annotations

import torch

from shards.errors import HeadwiseError

_BFLOAT16 = (8, 0)  # compute capabilities (major, minor)
_FLOAT8 = (8, 9)


class DeviceError(HeadwiseError):
    """A device that is not there, or cannot compute what was asked for."""


def check_device(device: torch.device, dtype: torch.dtype, *, float8: bool = False) -> None:
    """Raises `DeviceError` unless `device` ("cuda", "cuda:1") is there and computes in `dtype`,
    with `float8` in 8-bit floats as well. The CPU computes anything."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise DeviceError(f"device={device}: the CUDA kernels run on cuda; use cuda or cpu")
    if torch.version.cuda is None:
        raise DeviceError(
            f"device={device}: torch {torch.__version__} is built without CUDA; "
            "install a CUDA build of torch, or use device=cpu"
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device={device}: torch sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, "
            "or use device=cpu"
        )
    there = torch.cuda.device_count()
    if device.index is not None and device.index >= there:
        raise DeviceError(
            f"device={device}: this process sees {there} GPUs; use cuda:0 to cuda:{there - 1}"
        )
    able = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (compute capability {able[0]}.{able[1]})"
    if dtype == torch.bfloat16 and able < _BFLOAT16:
        raise DeviceError(f"dtype=bfloat16: {name} computes it from 8.0 on; use dtype=float16")
    if float8 and able < _FLOAT8:
        raise DeviceError(f"quantization=fp8: {name} computes it from 8.9 on; use int8 or int4")
