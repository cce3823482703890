"""From floats to codes.

8 bits: a group's scale is its largest magnitude over 127. Fewer bits: of several scales that clip
the outermost weights more or less, the one with the least squared error is taken, after it (and its
minimum) were fitted to the codes by linear least squares. In all of them the codes are the nearest
ones to the scales and minima as they are stored, in float16.
"""

from __future__ import annotations

import torch

from shards.quantization.packing import pack
from shards.quantization.scheme import Scheme
from shards.quantization.tensor import QuantizedTensor

# Candidates: by how many steps a group's range is wider than its codes reach.
_SYMMETRIC_STRETCHES = (-0.7, -0.3, 0.1, 0.5, 1.0)
_STRETCHES = (-0.5, 0.0, 0.5, 1.0)
# Weights that are worked on at a time, so that what is in between stays in the processor's cache.
_CHUNK = 1 << 16

Fit = tuple[torch.Tensor, torch.Tensor | None]


def quantize(weight_RI: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """`weight_RI`, floats [rows, inputs], in `scheme`, on its own device.

    Raises `ValueError` where `inputs` are not whole blocks of 32. A group that holds what float16
    scales cannot reach (8 million in INT8), or no numbers, has a scale or a minimum that is not
    finite.
    """
    rows, inputs = weight_RI.shape
    quantized = QuantizedTensor.empty(scheme, rows, inputs, weight_RI.device)
    step = max(1, _CHUNK // inputs)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        # Sums round by memory order: a transposed weight is to have the same codes.
        rows_RI = weight_RI[start:stop].float().contiguous()
        groups_RGC = torch.unflatten(rows_RI, 1, (-1, scheme.group))
        quantized.rows(start, stop).copy_(_quantize(groups_RGC, scheme))
    return quantized


def _quantize(groups_RGC: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    scale_RG1, minimum_RG1 = _fit(groups_RGC, scheme)
    scale_RG1 = scale_RG1.half()
    offset = scheme.zero
    if minimum_RG1 is not None:
        minimum_RG1 = minimum_RG1.half()
        groups_RGC = groups_RGC - minimum_RG1.float()
    codes_RGC = (groups_RGC * _inverse(scale_RG1.float())).add_(offset).round_()
    if scheme.bits == 8:
        codes_RGC = codes_RGC.clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    else:
        codes_RGC = codes_RGC.clamp_(0, (1 << scheme.bits) - 1).to(torch.uint8)
    return QuantizedTensor(
        scheme,
        pack(codes_RGC.flatten(1), scheme.bits),
        scale_RG1.squeeze(2),
        None if minimum_RG1 is None else minimum_RG1.squeeze(2),
    )


def _fit(groups_RGC: torch.Tensor, scheme: Scheme) -> Fit:
    """float32 scales and minima, [rows, groups, 1] each."""
    if scheme.has_minimum:
        return _fit_scale_and_minimum(groups_RGC, (1 << scheme.bits) - 1)
    if scheme.bits == 8:
        return groups_RGC.abs().amax(2, keepdim=True) / 127, None
    return _fit_scale(groups_RGC, scheme.zero), None


def _fit_scale(groups_RGC: torch.Tensor, zero: int) -> torch.Tensor:
    """Codes reach from -zero to zero - 1: the weight of largest magnitude, of either sign, takes
    the longer side, and a scale has the opposite of its sign."""
    outermost = groups_RGC.abs().argmax(2, keepdim=True)
    step_RG1 = groups_RGC.gather(2, outermost) / -zero
    least_RG1 = torch.full_like(step_RG1, -1)
    best_RG1 = step_RG1
    for stretch in _SYMMETRIC_STRETCHES:
        inverse_RG1 = _inverse(step_RG1) * (1 + stretch / zero)
        codes_RGC = (groups_RGC * inverse_RG1).round_().clamp_(-zero, zero - 1)
        product_RG1 = (groups_RGC * codes_RGC).sum(2, keepdim=True)
        square_RG1 = codes_RGC.square_().sum(2, keepdim=True)
        fitted_RG1 = product_RG1 * _inverse(square_RG1)
        # |w - s c|^2 is |w|^2 - s (w c) at the fitted s.
        gain_RG1 = fitted_RG1 * product_RG1
        better_RG1 = gain_RG1 > least_RG1
        least_RG1 = torch.where(better_RG1, gain_RG1, least_RG1)
        best_RG1 = torch.where(better_RG1, fitted_RG1, best_RG1)
    return best_RG1


def _fit_scale_and_minimum(groups_RGC: torch.Tensor, top: int) -> Fit:
    """Codes reach from 0 to `top`. Each candidate's scale and minimum are fitted to the codes that
    it gives."""
    count = groups_RGC.shape[2]
    lowest_RG1, highest_RG1 = groups_RGC.aminmax(dim=2, keepdim=True)
    total_RG1 = groups_RGC.sum(2, keepdim=True)
    best_RG1 = torch.full_like(lowest_RG1, -1)
    scale_RG1, minimum_RG1 = torch.zeros_like(lowest_RG1), total_RG1 / count
    for stretch in _STRETCHES:
        step_RG1 = (highest_RG1 - lowest_RG1) / (top + stretch)
        start_RG1 = lowest_RG1 + stretch / 2 * step_RG1
        codes_RGC = ((groups_RGC - start_RG1) * _inverse(step_RG1)).round_().clamp_(0, top)
        sum_RG1 = codes_RGC.sum(2, keepdim=True)
        spread_RG1 = count * (codes_RGC * codes_RGC).sum(2, keepdim=True) - sum_RG1 * sum_RG1
        product_RG1 = (codes_RGC * groups_RGC).sum(2, keepdim=True)
        covariance_RG1 = count * product_RG1 - total_RG1 * sum_RG1
        fitted_RG1 = covariance_RG1 * _inverse(spread_RG1)
        # Times `count`, how much less the squared error is than that of the mean alone.
        gain_RG1 = fitted_RG1 * covariance_RG1
        better_RG1 = gain_RG1 > best_RG1
        best_RG1 = torch.where(better_RG1, gain_RG1, best_RG1)
        scale_RG1 = torch.where(better_RG1, fitted_RG1, scale_RG1)
        minimum_RG1 = torch.where(
            better_RG1, (total_RG1 - fitted_RG1 * sum_RG1) / count, minimum_RG1
        )
    return scale_RG1, minimum_RG1


def _inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / values, and 0 for 0: a group of zeros has the scale 0 and the codes of 0."""
    return torch.where(values == 0, 0, 1 / values)
