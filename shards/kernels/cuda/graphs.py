"""Work captured as a CUDA graph, to be launched as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

# Libraries take workspaces, choose kernels and compile them when first called.
_WARM_UPS = 2


class Capture(Protocol):
    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do `work` until it is warm, capture it; what is returned does it again, over the same
        addresses."""
        ...


class CudaCapture:
    """Graphs that share one memory pool: no two of them may be under way at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    work()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as the one that watches NCCL, go on asking CUDA for events.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        return graph.replay
