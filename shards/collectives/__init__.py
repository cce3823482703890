"""How ranks exchange tensors: the choice of a transport, and the way into its group.

Light to import: torch and the transports load in `connect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from shards.errors import CollectiveError

if TYPE_CHECKING:
    from shards.collectives.base import Collective

__all__ = ["Transport", "choose", "connect"]

Transport = Literal["local", "shared_memory", "gloo", "nccl", "symmetric_memory"]

_NAMES = ("auto", "shared_memory", "gloo", "nccl", "symmetric_memory", "local")


def choose(name: str, *, world: int, device: str, one_host: bool) -> Transport:
    """The transport for `world` ranks on `device` ("cpu", "cuda", "cuda:1"); pure.

    "auto" takes nccl on GPUs, and on CPUs shared memory within a host and gloo between hosts.
    A world of one needs no transport and always gets "local".

    Raises `CollectiveError` for a name that does not exist or cannot work there.
    """
    kind = device.partition(":")[0]
    if name not in _NAMES:
        raise CollectiveError(f"collective={name!r}: use one of {', '.join(_NAMES)}")
    if kind not in ("cpu", "cuda"):
        raise CollectiveError(f"device={device!r}: use cpu or cuda")
    if world < 1:
        raise CollectiveError(f"world={world}: a group has at least one rank")
    if name in ("nccl", "symmetric_memory") and kind != "cuda":
        raise CollectiveError(
            f"collective={name} moves GPU tensors and device is {device}: use auto"
        )
    if name in ("shared_memory", "gloo") and kind != "cpu":
        raise CollectiveError(
            f"collective={name} moves CPU tensors and device is {device}: use nccl or auto"
        )
    if name in ("shared_memory", "symmetric_memory") and not one_host:
        raise CollectiveError(
            f"collective={name} needs all ranks on one host: use auto, or placement=STRICT_PACK"
        )
    if world == 1:
        return "local"
    if name == "local":
        raise CollectiveError(f"collective=local is for one rank and world is {world}: use auto")
    if name == "shared_memory" or (name == "auto" and kind == "cpu" and one_host):
        return "shared_memory"
    if name == "symmetric_memory":
        return "symmetric_memory"
    if name == "nccl" or (name == "auto" and kind == "cuda"):
        return "nccl"
    return "gloo"


def connect(
    name: Transport,
    *,
    rank: int,
    world: int,
    epoch: int,
    deadline_s: float,
    device: str = "cpu",
    rendezvous: str = "",
    segment: int | None = None,
) -> Collective:
    """Join this epoch's group over what `choose` returned. Blocks until all ranks have come, except
    for shared memory, whose first call waits for them.

    `rendezvous` is the "host:port" of the driver's `rendezvous.host_store` (gloo, nccl); `segment`
    the descriptor from its `segment.create_segment` (shared memory), which the caller closes.

    Raises `CollectiveTimeout` where a rank does not come within `deadline_s`, and
    `CollectiveError` where arguments do not fit together.
    """
    if name == "local":
        from shards.collectives.local import Local

        if world != 1:
            raise CollectiveError(f"collective=local is for one rank and world is {world}")
        return Local()
    if name == "shared_memory":
        from shards.collectives.shared_memory import SharedMemory

        if segment is None:
            raise CollectiveError("collective=shared_memory needs the driver's segment descriptor")
        return SharedMemory(segment, rank, world, deadline_s)
    if name == "gloo":
        from shards.collectives.gloo import Gloo

        return Gloo(rendezvous, epoch, rank, world, deadline_s)
    if name == "nccl":
        import torch

        from shards.collectives.nccl import Nccl

        return Nccl(rendezvous, epoch, rank, world, deadline_s, torch.device(device))
    if name == "symmetric_memory":
        import torch

        from shards.collectives.symmetric_memory import SymmetricMemory

        return SymmetricMemory(rendezvous, epoch, rank, world, deadline_s, torch.device(device))
    raise CollectiveError(f"collective={name!r}: use what choose() returned")
