"""How a checkpoint's parameters are to lie in memory. No torch: the driver asks as well."""

from __future__ import annotations

from shards.checkpoint.locate import locate
from shards.layout import Layout
from shards.models.source import ModelSource, load_spec, open_model
from shards.models.spec import ModelSpec
from shards.quantization.choice import Choice, Quantization, choose_schemes


def choose_storage(source: ModelSource, layout: Layout, quantization: Quantization) -> Choice:
    """`choose_schemes` for the dtypes that `source` has its parameters in."""
    return choose_schemes(source.spec, layout, quantization, stored_dtypes(source))


def stored_dtypes(source: ModelSource) -> dict[str, str]:
    """Parameter name -> the dtype of its tensor.

    Not of transposed ones, which are never kept as they are: their blocks lie along the outputs.
    """
    return {
        name: source.checkpoint.tensors[where.tensors[0]].dtype
        for name, where in source.sources.items()
        if not where.transpose
    }


def load_stored(model: str, revision: str | None = None) -> tuple[ModelSpec, dict[str, str]]:
    """The spec of `model` and its `stored_dtypes`, from headers. Of a folder, whose weights need
    not be there, the config.json is read alone, and the dtypes are left empty.

    Raises as `open_model` does. Imports neither torch nor transformers.
    """
    if locate(model, revision, weights=False).kind == "gguf":
        source = open_model(model, revision)
        return source.spec, stored_dtypes(source)
    return load_spec(model, revision), {}
