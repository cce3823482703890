"""4-bit codes through PyTorch's own kernel, `torch._weight_int4pack_mm`.

It multiplies bfloat16 by (code - 8) * scale + zero, scales and zeros in bfloat16 for groups of 32
inputs and more, codes in tiles of the tensor cores' order. Our float16 scales lose up to 2^-9 of
themselves on the way there, the codes nothing.

Shape letters: T rows, R outputs, I inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shards.quantization.packing import unpack
from shards.quantization.tensor import QuantizedTensor

_TILE_OUTPUTS = 8
_TILE_INPUTS = 16
# How many tiles along the inputs lie together: the more, the wider the loads.
_INNER_TILES = (8, 4, 2)


def fits(weight: QuantizedTensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such weights, multiplied with such activations."""
    return weight.scheme.bits == 4 and dtype == torch.bfloat16 and weight.codes.is_cuda


class Int4Matrix:
    """A `CudaMatrix` for which `fits` holds.

    Its tiles are made when it first multiplies, before any request, and the codes in their plain
    order are dropped then, unless rows were looked up before: a tied embedding keeps both.
    """

    def __init__(self, weight: QuantizedTensor) -> None:
        self.outputs, self.inputs = weight.shape
        self._group = weight.scheme.group
        self._plain: QuantizedTensor | None = weight
        self._looked_up = False
        self._tiles: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        plain = 0 if self._plain is None else self._plain.nbytes
        return plain + sum(plane.nbytes for plane in self._tiles or ())

    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        if self._tiles is None:
            weight = self._codes()
            self._tiles = tile_codes(weight), scales_and_zeros(weight)
            if not self._looked_up:
                self._plain = None
        codes, scales = self._tiles
        y = torch._weight_int4pack_mm(x_TI.contiguous(), codes, self._group, scales)
        return y[:, : self.outputs]

    def rows(self, at_T: torch.Tensor) -> torch.Tensor:
        self._looked_up = True
        return self._codes().permuted(lambda plane: plane[at_T]).dequantize(torch.bfloat16)

    def _codes(self) -> QuantizedTensor:
        if self._plain is None:
            raise RuntimeError("rows of a matrix that has multiplied before are no longer there")
        return self._plain


def tile_codes(weight: QuantizedTensor) -> torch.Tensor:
    """The codes in the kernel's order, outputs filled up to whole tiles."""
    pairs = paired_codes(weight)
    inner = next(n for n in _INNER_TILES if weight.shape[1] % (n * _TILE_INPUTS) == 0)
    return torch._convert_weight_to_int4pack(pairs, inner)


def paired_codes(weight: QuantizedTensor) -> torch.Tensor:
    """uint8 [R up to a multiple of 8, I / 2]: the even input's code in the high nibble, the odd
    one's in the low."""
    codes_RI = unpack(weight.codes, 4)
    return _whole_tiles(codes_RI[:, 0::2] << 4 | codes_RI[:, 1::2])


def scales_and_zeros(weight: QuantizedTensor) -> torch.Tensor:
    """bfloat16 [G, R up to a multiple of 8, 2].

    The kernel's codes count from 8: code * scale + minimum is (code - 8) * scale + zero with
    zero = minimum + 8 * scale, and a symmetric scheme's zero is 0.
    """
    scales_RG = weight.scales.float()
    if weight.minima is None:
        zeros_RG = torch.zeros_like(scales_RG)
    else:
        zeros_RG = weight.minima.float() + 8 * scales_RG
    both_RG2 = _whole_tiles(torch.stack((scales_RG, zeros_RG), -1).bfloat16())
    return both_RG2.transpose(0, 1).contiguous()


def _whole_tiles(rows: torch.Tensor) -> torch.Tensor:
    missing = -len(rows) % _TILE_OUTPUTS
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)).contiguous()
