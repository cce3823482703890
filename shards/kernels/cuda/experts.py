"""A mixture of experts on a GPU: tokens sorted by expert, then one grouped matmul for all of them.

Nothing here depends on how tokens were routed but the numbers on the device, so that a graph can
hold it.

Shape letters: P pairs of a token and one of its experts, E experts of this rank, R outputs,
I inputs, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shards.errors import UnsupportedModel
from shards.kernels.base import Experts, Weight
from shards.kernels.cuda.matrix import CudaMatrix
from shards.kernels.reference.elementwise import gate
from shards.kernels.reference.experts import Sorted, count_tokens, route

# `grouped_mm` wants rows of a multiple of so many bytes.
_ROW_BYTES = 16


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """Weights [E, R, I] of a `CudaMatrix`, both padded with zeros to what `grouped_mm` takes.

    Quantised weights are widened: the grouped matmul is of floats.
    """

    weight_ERI: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def of(
        cls, experts: Sequence[Sequence[Weight]], dtype: torch.dtype, device: torch.device
    ) -> ExpertMatrices:
        """Raises `UnsupportedModel` for a dtype that has no grouped matmul on the device."""
        if device.type == "cuda" and dtype is not torch.bfloat16:
            raise UnsupportedModel(
                f"experts in {dtype}: on GPUs their grouped matmul is of bfloat16 alone; use "
                "--dtype bfloat16"
            )
        each = [torch.cat([_floats(weight, dtype) for weight in own]) for own in experts]
        outputs, inputs = each[0].shape
        multiple = _ROW_BYTES // dtype.itemsize
        padding = (0, -inputs % multiple, 0, -outputs % multiple)
        return cls(torch.stack([F.pad(weight, padding) for weight in each]), (outputs, inputs))

    @property
    def outputs(self) -> int:
        return len(self.weight_ERI) * self.shape[0]

    @property
    def inputs(self) -> int:
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        return self.weight_ERI.nbytes

    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        raise TypeError("experts are applied to their own tokens: use `apply_sorted`")

    def rows(self, at_T: torch.Tensor) -> torch.Tensor:
        raise TypeError("rows are looked up in one matrix, not in those of several experts")

    def apply_sorted(self, x_PI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """[P, R]: each expert's rows end where `ends_E` says; behind the last lies anything."""
        padded_PI = F.pad(x_PI, (0, self.weight_ERI.shape[2] - self.shape[1]))
        y_PR = F.grouped_mm(padded_PI, self.weight_ERI.transpose(1, 2), offs=ends_E)
        return y_PR[:, : self.shape[0]]


def mix(
    normed_TD: torch.Tensor, logits_TE: torch.Tensor, experts: Experts[CudaMatrix]
) -> torch.Tensor:
    """`Sentences.mix`, given what the router said."""
    up, down = experts.up, experts.down
    assert isinstance(up, ExpertMatrices)
    assert isinstance(down, ExpertMatrices)
    chosen_TX, weights_TX = route(logits_TE, experts.correction, experts.choice)
    count_tokens(chosen_TX, experts.load)
    pairs = Sorted.of(chosen_TX, weights_TX, experts.first, experts.count)
    h = up.apply_sorted(pairs.gathered(normed_TD), pairs.ends_E)
    if experts.up_bias is not None:
        h = h + experts.up_bias[pairs.experts_P]
    y_PD = down.apply_sorted(gate(h, experts.gating), pairs.ends_E)
    if experts.down_bias is not None:
        y_PD = y_PD + experts.down_bias[pairs.experts_P]
    return pairs.summed(y_PD)


def _floats(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight.dequantize(dtype)
