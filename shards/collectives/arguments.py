"""Checks of what every transport is called with. Mistakes of the caller: ValueError, at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shards.errors import CollectiveError


def check_place(rank: int, world: int, deadline_s: float) -> None:
    """Raises `CollectiveError` for a rank outside its world or a deadline that is none."""
    if not 0 <= rank < world:
        raise CollectiveError(f"rank={rank}: a world of {world} has ranks 0 to {world - 1}")
    if not deadline_s > 0:
        raise CollectiveError(f"deadline_s={deadline_s}: give the seconds that a call may wait")


def check_in_place(x: torch.Tensor, device_type: str) -> None:
    """What is written in place must be contiguous and lie where the transport works."""
    if not x.is_contiguous():
        raise ValueError(f"tensor of shape {tuple(x.shape)}, strides {x.stride()}: not contiguous")
    if x.device.type != device_type:
        raise ValueError(f"tensor on {x.device}: this collective works on {device_type}")


def check_sum(x: torch.Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"all_reduce of {x.dtype}: only floating point is summed")


def check_widths(x_TN: torch.Tensor, widths: Sequence[int], rank: int, world: int) -> None:
    """One width per rank, and this rank's is that of its tensor."""
    if len(widths) != world:
        raise ValueError(f"{len(widths)} widths for {world} ranks: give one per rank")
    if x_TN.dim() == 0 or x_TN.shape[-1] != widths[rank]:
        raise ValueError(
            f"rank {rank} gathers a tensor of shape {tuple(x_TN.shape)}, "
            f"and widths[{rank}] is {widths[rank]}"
        )
