"""Attention through FlashInfer (arXiv:2501.01005), written against its release 0.6.

A plan says which thread block computes what. It is made on the host, once a step for every kind of
layer, and read by all layers of that kind. Our cache is FlashInfer's layout HND.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch

from shards.batch import Batch
from shards.kernels.base import Pattern
from shards.kernels.cuda.attention.base import Geometry
from shards.kernels.cuda.attention.groups import groups_of
from shards.kernels.cuda.mirror import Mirror
from shards.kernels.cuda.pages import Pages, pages_of
from shards.kv_cache import LayerCache

LIBRARY = "flashinfer"
# Those that FlashInfer's paged kernels are instantiated for.
_HEAD_DIMS = frozenset({64, 128, 256})
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends
# Groups of so many query heads decode at least as fast on CUDA cores as on tensor cores.
_SMALL_GROUP = 3


class FlashInfer:
    """One workspace for the epoch: steps run one after the other on one stream."""

    name = "flashinfer"
    module: ClassVar[str | None] = LIBRARY

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        # FlashInfer wants it zero before its first use.
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=geometry.device)

    @staticmethod
    def unfit(geometry: Geometry) -> str | None:
        """Why it cannot serve these caches, if it cannot."""
        if geometry.dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in 16 bits, not in {geometry.dtype}"
        if not geometry.plain:
            return "it is used for plain causal attention with a window alone"
        others = sorted(geometry.head_dims - _HEAD_DIMS)
        if others:
            return f"head_dim {others[0]} is none of {', '.join(map(str, sorted(_HEAD_DIMS)))}"
        return None

    def captures(self, rows: int) -> bool:
        return True

    def captured(self, rows: int) -> CapturedDecode:
        return CapturedDecode(self._geometry, self._workspace, rows)

    def eager(self) -> EagerSpans:
        return EagerSpans(self._geometry, self._workspace)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a plan and its kernel depend on; heads are counted in whole groups."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    scale: float

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """`window_left` does not count the position itself."""
        return {
            "window_left": -1 if self.window is None else self.window - 1,
            "sm_scale": self.scale,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }


class PlannedAttention(ABC):
    """A wrapper of FlashInfer's for each kind of layer, planned anew for every step."""

    def __init__(self, geometry: Geometry, workspace: torch.Tensor) -> None:
        self._geometry = geometry
        self._workspace = workspace
        self._mirror = Mirror(geometry.device, fixed=False)
        self._wrappers: dict[Kind, Any] = {}
        self._pages: Pages | None = None

    def plan(self, batch: Batch) -> None:
        self._pages = pages_of(batch, self._geometry.block_size)
        for kind, wrapper in self._wrappers.items():
            self._plan(wrapper, kind, self._pages)

    def attend(self, q_TNH: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        groups = groups_of(pattern, self._geometry.device)
        head_dim = q_TNH.shape[2]
        kind = Kind(groups.heads, groups.kv_heads, head_dim, pattern.window, pattern.scale)
        wrapper = self._wrappers.get(kind)
        if wrapper is None:
            if self._pages is None:
                raise RuntimeError("asked to attend before a plan")
            wrapper = self._wrappers[kind] = self._wrapper(kind)
            self._plan(wrapper, kind, self._pages)
        out = wrapper.run(groups.spread(q_TNH), (cache.keys, cache.values))
        return groups.collect(out)

    @abstractmethod
    def _wrapper(self, kind: Kind) -> Any: ...

    @abstractmethod
    def _plan(self, wrapper: Any, kind: Kind, pages: Pages) -> None: ...


class CapturedDecode(PlannedAttention):
    """Decodes of a fixed number of rows, over index buffers that a graph reads."""

    def __init__(self, geometry: Geometry, workspace: torch.Tensor, rows: int) -> None:
        super().__init__(geometry, workspace)

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=geometry.device)

        self._starts = buffer(rows + 1)
        self._indices = buffer(rows * geometry.blocks)
        self._last_lengths = buffer(rows)

    def _wrapper(self, kind: Kind) -> Any:
        return import_module(LIBRARY).BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=kind.heads > _SMALL_GROUP * kind.kv_heads,
            paged_kv_indptr_buffer=self._starts,
            paged_kv_indices_buffer=self._indices,
            paged_kv_last_page_len_buffer=self._last_lengths,
        )

    def _plan(self, wrapper: Any, kind: Kind, pages: Pages) -> None:
        wrapper.plan(
            torch.from_numpy(pages.starts),
            self._mirror.put("indices", pages.indices),
            torch.from_numpy(pages.last_lengths),
            kind.heads,
            kind.kv_heads,
            kind.head_dim,
            self._geometry.block_size,
            **kind.options(self._geometry.dtype),
        )


class EagerSpans(PlannedAttention):
    """Any step: the decodes in it are spans of one row."""

    def _wrapper(self, kind: Kind) -> Any:
        return import_module(LIBRARY).BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")

    def _plan(self, wrapper: Any, kind: Kind, pages: Pages) -> None:
        wrapper.plan(
            torch.from_numpy(pages.row_starts),
            torch.from_numpy(pages.starts),
            self._mirror.put("indices", pages.indices),
            torch.from_numpy(pages.last_lengths),
            kind.heads,
            kind.kv_heads,
            kind.head_dim,
            self._geometry.block_size,
            causal=True,
            **kind.options(self._geometry.dtype),
        )
