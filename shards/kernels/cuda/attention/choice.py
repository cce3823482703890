"""Which attention library serves an epoch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import structlog

from shards.errors import UnsupportedModel
from shards.kernels.cuda.attention.base import AttentionBackend, Geometry
from shards.kernels.cuda.attention.flash_attention import FlashAttention
from shards.kernels.cuda.attention.flashinfer import FlashInfer
from shards.kernels.cuda.attention.sdpa import Sdpa

log = structlog.get_logger(__name__)

AttentionName = Literal["auto", "flashinfer", "flash_attention", "sdpa"]

_Library = FlashInfer | FlashAttention | Sdpa

_BEST_FIRST: tuple[type[_Library], ...] = (FlashInfer, FlashAttention, Sdpa)


def choose(wanted: AttentionName, geometry: Geometry) -> AttentionBackend:
    """The backend that was asked for; "auto" takes the best that can serve these caches.

    Logs the choice, and why the better ones were passed over. Raises `UnsupportedModel` where what
    was asked for cannot serve them.
    """
    passed: dict[str, str] = {}
    for backend in _BEST_FIRST:
        if wanted not in ("auto", backend.name):
            continue
        reason = _unfit(backend, geometry)
        if reason is None:
            log.info("attention", backend=backend.name, passed_over=passed)
            return backend(geometry)
        passed[backend.name] = reason
    reasons = "; ".join(passed.values())
    raise UnsupportedModel(f"attention={wanted}: {reasons}; use attention=auto")


def _unfit(backend: type[_Library], geometry: Geometry) -> str | None:
    if backend.module is not None:
        if geometry.device.type != "cuda":
            return f"it runs on CUDA, not on {geometry.device}"
        if find_spec(backend.module) is None:
            return f"the module {backend.module} is not installed"
    return backend.unfit(geometry)
