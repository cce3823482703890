"""FP8 (E4M3) weights and the scales that lie beside them in a folder of safetensors files.

A weight [rows, inputs] is the product of its elements and of scales that blocks of it share:

    X.weight_scale_inv  a scale for each block of weight_block_size, the last ones cut short
                        (arXiv:2412.19437, section 3.3; DeepSeek-V3's and Qwen3's folders)
    X.weight_scale      one scale, one for each row, or one for each block (compressed-tensors,
                        FBGEMM's and ModelOpt's folders)

Scales of activations and of the KV cache are left alone: neither is quantised here. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from shards.checkpoint.checkpoint import Checkpoint, Scales, TensorInfo
from shards.errors import CheckpointError, UnsupportedModel

FIELD = "quantization_config"

_DTYPE = "F8_E4M3"
_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")
_WEIGHT = ".weight"
_SCALES = (".weight_scale_inv", ".weight_scale")
_OF_ACTIVATIONS = (
    ".input_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
)
_METHODS = "fp8, fbgemm_fp8, modelopt (FP8), compressed-tensors (float-quantized) and mxfp4"


@dataclass(frozen=True, slots=True)
class Float8:
    """How a folder's FP8 weights are scaled: `block` is the rows and inputs that share a scale,
    None where scales are for whole tensors or rows."""

    block: tuple[int, int] | None = None


def float8_of(config: Mapping[str, Any]) -> Float8 | None:
    """What a config.json's `quantization_config` says; None where weights are not FP8.

    Raises `UnsupportedModel`, naming the method, for any that cannot be read.
    """
    stated = config.get(FIELD)
    if stated is None:
        return None
    if not isinstance(stated, Mapping):
        raise UnsupportedModel(f"config field {FIELD} is {stated!r:.80}: an object is needed")
    method = stated.get("quant_method")
    if method == "mxfp4":  # GPT-OSS: its sources say which tensors are blocks
        return None
    if method == "fp8":
        fmt = stated.get("fmt") or "e4m3"
        if fmt != "e4m3":
            raise _unknown(method, f"fmt {fmt!r}")
        return Float8(_block(stated.get("weight_block_size")))
    if method == "fbgemm_fp8":
        return Float8()
    if method == "modelopt":
        if stated.get("quant_algo") != "FP8":
            raise _unknown(method, f"quant_algo {stated.get('quant_algo')!r}")
        return Float8()
    if method == "compressed-tensors":
        return _compressed(stated)
    raise _unknown(method)


def scaled(checkpoint: Checkpoint, float8: Float8) -> Checkpoint:
    """`checkpoint` whose FP8 matrices are read as what they stand for; without their scales, nor
    those of activations.

    Raises `CheckpointError` where a matrix has no scales, or other than `float8` says.
    """
    tensors = dict(checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        if name.endswith(_OF_ACTIVATIONS):
            del tensors[name]
        elif info.dtype == _DTYPE and len(info.shape) == 2:
            scales = _name_of_scales(name, checkpoint.tensors)
            tensors.pop(scales, None)
            tensors[name] = replace(
                info, scales=_scales(name, info, checkpoint.tensors[scales], float8)
            )
    return checkpoint.with_tensors(tensors)


def _name_of_scales(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    module = name.removesuffix(_WEIGHT)
    for suffix in _SCALES:
        if module + suffix in tensors:
            return module + suffix
    raise CheckpointError(
        f"tensor {name} is {_DTYPE} and has neither {module}{_SCALES[0]} nor {module}{_SCALES[1]} "
        "beside it: fetch the checkpoint again"
    )


def _scales(name: str, weight: TensorInfo, scales: TensorInfo, float8: Float8) -> Scales:
    rows, inputs = weight.shape
    if scales.dtype not in _SCALE_DTYPES:
        raise UnsupportedModel(
            f"the scales of tensor {name} are {scales.dtype}: known are {', '.join(_SCALE_DTYPES)}"
        )
    blocks = {(1, 1): (rows, inputs), (rows, 1): (1, inputs)}
    if float8.block is not None:
        down, across = float8.block
        blocks[-(-rows // down), -(-inputs // across)] = float8.block
    count = prod(scales.shape)
    grid = scales.shape if len(scales.shape) == 2 else (count, 1)
    if grid not in blocks:
        raise CheckpointError(
            f"tensor {name} is {list(weight.shape)} and its scales are {list(scales.shape)}: "
            f"expected {' or '.join(str(list(shape)) for shape in blocks)}"
        )
    return Scales(replace(scales, shape=grid), *blocks[grid])


def _compressed(stated: Mapping[str, Any]) -> Float8:
    """compressed-tensors' groups of modules, each with how its weights are quantised."""
    method, fmt = "compressed-tensors", stated.get("format")
    groups = stated.get("config_groups")
    if fmt != "float-quantized" or not isinstance(groups, Mapping):
        raise _unknown(method, f"format {fmt!r}")
    found = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise _unknown(method, "a group without weights")
        kind = (weights.get("num_bits"), weights.get("type"))
        if kind != (8, "float"):
            raise _unknown(method, f"weights of {kind[0]!r} bits, type {kind[1]!r}")
        if weights.get("strategy") not in ("tensor", "channel", "block"):
            raise _unknown(method, f"weights' strategy {weights.get('strategy')!r}")
        if weights.get("block_structure") is not None:
            found.add(_block(weights["block_structure"]))
    if len(found) > 1:
        raise _unknown(method, "groups of different block_structure")
    return Float8(found.pop() if found else None)


def _block(stated: Any) -> tuple[int, int] | None:
    if stated is None:
        return None
    sizes = list(stated) if isinstance(stated, list | tuple) else []
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise UnsupportedModel(
            f"config field {FIELD} states blocks of {stated!r:.80}: two numbers above 0 are needed"
        )
    return sizes[0], sizes[1]


def _unknown(method: Any, what: str = "") -> UnsupportedModel:
    detail = f" with {what}" if what else ""
    return UnsupportedModel(
        f"config field {FIELD} states quant_method {method!r}{detail}: readable are {_METHODS}; "
        "give the model's unquantised safetensors, to be quantised by --quantization, or a GGUF "
        "file of it"
    )
