"""This host's processor as a device: what was measured here, and where that is kept."""

from __future__ import annotations

import os
import platform
from bisect import bisect_left
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from shards.cost.device import Arithmetic, Rates
from shards.cost.errors import CannotPredict

_CPU_INFO = Path("/proc/cpuinfo")


class CoreRates(msgspec.Struct, frozen=True):
    """What `cores` cores attain together: bytes/s read from memory, operations/s of matrix products
    with many rows."""

    cores: int
    bandwidth: float
    operations: dict[Arithmetic, float]


class HostProfile(msgspec.Struct, frozen=True, omit_defaults=True):
    """A `Device`: ranks are processes of this host and share its cores and memory evenly; where
    they do not share (`shared`), each has a host like this one.

    `measured` has one entry per number of cores, ascending. What kernels attain of the measured
    rates is stated as two shares: cores wait for each other at the end of every call.
    """

    name: str
    memory_bytes: int
    measured: tuple[CoreRates, ...]
    shared: bool = True
    bandwidth_share: float = 0.9
    operations_share: float = 0.8
    half_rows: float = 2.0
    call_s: float = 3e-6
    step_s: float = 250e-6

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        return "cpu"

    @property
    def link(self) -> str:
        return "shared-memory"

    @property
    def cores(self) -> int:
        return self.measured[-1].cores

    def on_cores(self, cores: int) -> HostProfile:
        """This host with its first `cores` cores alone, such as one rank that runs one thread."""
        if not 1 <= cores <= self.cores:
            raise CannotPredict(
                f"cores {cores}: {self.name} was measured with up to {self.cores}; use 1 to "
                f"{self.cores}"
            )
        kinds = self.measured[-1].operations
        most = CoreRates(
            cores, self._at(cores, None), {kind: self._at(cores, kind) for kind in kinds}
        )
        below = tuple(rates for rates in self.measured if rates.cores < cores)
        return msgspec.structs.replace(self, measured=(*below, most))

    def rank(self, world: int) -> Rates:
        """An even share of the cores; where ranks outnumber cores, they take turns."""
        world = world if self.shared else 1
        busy = min(self.cores, world * max(1, self.cores // world))
        kinds = self.measured[-1].operations
        return Rates(
            bandwidth=self._at(busy, None) * self.bandwidth_share / world,
            operations={
                kind: self._at(busy, kind) * self.operations_share / world for kind in kinds
            },
            half_rows=self.half_rows,
            call_s=self.call_s,
        )

    def memory(self, world: int) -> int:
        return self.memory_bytes // world if self.shared else self.memory_bytes

    def devices(self, world: int) -> int:
        return 1 if self.shared else world

    def _at(self, cores: int, kind: Arithmetic | None) -> float:
        """The rate of `cores` cores together, linear between the measured numbers of cores."""

        def rate(measured: CoreRates) -> float:
            return measured.bandwidth if kind is None else measured.operations[kind]

        above = self.measured[bisect_left(self.measured, cores, key=lambda m: m.cores)]
        if above.cores == cores or above is self.measured[0]:
            return rate(above) * cores / above.cores
        below = self.measured[self.measured.index(above) - 1]
        share = (cores - below.cores) / (above.cores - below.cores)
        return rate(below) + share * (rate(above) - rate(below))


def host_name() -> str:
    """The processor and how many of its cores this process may use."""
    model = platform.machine()
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
                break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def profile_path() -> Path:
    """Where this host's profile is kept; a home folder may be shared between hosts."""
    return Path(platformdirs.user_cache_dir("headwise")) / "hosts" / f"{platform.node()}.json"


def stored_host() -> HostProfile:
    """What was measured on this host; `CannotPredict` where nothing was, or on other cores."""
    path = profile_path()
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=HostProfile)
    except FileNotFoundError:
        raise CannotPredict(
            "device cpu: this host has not been measured; run `headwise plan` with --measure once"
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise CannotPredict(
            f"device cpu: {path} cannot be read ({error}): measure anew with --measure"
        ) from error
    if profile.name != host_name():
        raise CannotPredict(
            f"device cpu: {path} was measured on {profile.name}, and this is {host_name()}: "
            "measure anew with --measure"
        )
    return profile


def store_host(profile: HostProfile) -> None:
    """Keep it for `stored_host`; `CannotPredict` where its folder cannot be written."""
    path = profile_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(profile)))
    except OSError as error:
        raise CannotPredict(
            f"device cpu: {path} cannot be written ({error.strerror}): name another folder with "
            "XDG_CACHE_HOME"
        ) from error
