"""Host arrays on the device."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


class Mirror:
    """Copies a step's arrays over, in stream order and without waiting for the device.

    A `fixed` mirror keeps each array at the address where it first lay, as a graph that reads it
    needs; its arrays never change their shapes.
    """

    def __init__(self, device: torch.device, *, fixed: bool) -> None:
        self._device = device
        self._fixed = fixed
        self._kept: dict[str, torch.Tensor] = {}

    def put(self, name: str, values: npt.NDArray[Any]) -> torch.Tensor:
        """`values` on the device. They are read before this returns."""
        host = torch.from_numpy(values)
        # Pinned memory comes from torch's cache, which knows when the copy is done with it.
        host = host.pin_memory() if self._device.type == "cuda" else host.clone()
        kept = self._kept.get(name)
        if kept is not None:
            return kept.copy_(host, non_blocking=True)
        found = host.to(self._device, non_blocking=True)
        if self._fixed:
            self._kept[name] = found
        return found
