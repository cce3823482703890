"""The device that `headwise plan` predicts for: one of the catalogue, or this host."""

from __future__ import annotations

from msgspec import structs

from shards.cost.device import ACCELERATORS, Device, accelerator
from shards.cost.errors import CannotPredict
from shards.cost.host import store_host, stored_host


def device_of(name: str, link: str | None, *, measure: bool = False) -> Device:
    """The device called `name`; `measure` measures this host first, for a few seconds.

    Ranks on processors share this host, unless `link` is one between hosts: then each has a host
    like this one. Raises `CannotPredict` for a name that is not known, for "cuda", which says too
    little, and for "cpu" on a host that was not measured.
    """
    if name == "cuda":
        raise CannotPredict(f"device cuda: name the GPU, one of {', '.join(ACCELERATORS)}")
    if name != "cpu":
        return accelerator(name)
    if measure:
        # Brings torch and Numba along.
        from shards.cost.measurement import measure_host

        store_host(measure_host())
    host = stored_host()
    return structs.replace(host, shared=link in (None, host.link))
