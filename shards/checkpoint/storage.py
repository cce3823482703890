"""How a checkpoint's parameters are to lie in memory. No torch: the driver asks as well."""

from __future__ import annotations

from shards.layout import Layout
from shards.models.source import ModelSource
from shards.quantization.choice import Choice, Quantization, choose_schemes


def choose_storage(source: ModelSource, layout: Layout, quantization: Quantization) -> Choice:
    """`choose_schemes` for the dtypes that `source` has its parameters in.

    A transposed tensor is never kept as it is: its blocks lie along the outputs.
    """
    stored = {
        name: source.checkpoint.tensors[where.tensors[0]].dtype
        for name, where in source.sources.items()
        if not where.transpose
    }
    return choose_schemes(source.spec, layout, quantization, stored)
