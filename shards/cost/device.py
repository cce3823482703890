"""Devices as the cost model sees them: how fast one rank reads, computes and starts kernels.

Rates of accelerators are those of the makers' data sheets, dense (without structured sparsity);
what programs attain of them is stated as two shares per device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from shards.cost.errors import CannotPredict

Arithmetic = Literal["float32", "bfloat16", "float16", "int8", "fp8"]
"""The formats that a matrix product multiplies in."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank attains.

    `bandwidth` is bytes/s from memory, `operations` additions and multiplications per second.
    A product of `rows` rows runs at rows / (rows + half_rows) of that: half the rate at `half_rows`
    (Hockney's n-half), the rows of a tile that few rows leave empty. `call_s` is lost at each fused
    call of a layer: launch, ramp-up and tail.
    """

    bandwidth: float
    operations: Mapping[Arithmetic, float]
    half_rows: float
    call_s: float

    def scaled(self, factor: float) -> Rates:
        """Those of a device that is `factor` times as fast; what a call loses stays."""
        return replace(
            self,
            bandwidth=self.bandwidth * factor,
            operations={name: rate * factor for name, rate in self.operations.items()},
        )


class Device(Protocol):
    """What `predict` asks of a device. `step_s` is the seconds of a step outside of the model:
    the plan on its way, launching, the tokens on their way back."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Literal["cpu", "cuda"]: ...

    @property
    def link(self) -> str:
        """The link between ranks where none is named: a key of `shards.cost.link.LINKS`."""

    @property
    def step_s(self) -> float: ...

    def rank(self, world: int) -> Rates:
        """What one of `world` ranks attains while all of them are at work."""

    def memory(self, world: int) -> int:
        """Bytes that one of `world` ranks has."""

    def devices(self, world: int) -> int:
        """How many such devices `world` ranks take."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU; every rank has one of its own.

    `bandwidth`, `operations` and `memory_bytes` are the data sheet's. The attained shares are of
    decode-sized weight streaming, and of prefill-sized matrix products and attention. Defaults are
    the A100's, whose memory share and call time are fitted to gpt-fast's published table
    (docs/cost_model.md).
    """

    name: str
    memory_bytes: int
    bandwidth: float
    operations: Mapping[Arithmetic, float]
    link: str
    bandwidth_share: float = 0.75
    operations_share: float = 0.6
    half_rows: float = 16
    call_s: float = 4e-6
    step_s: float = 200e-6
    kind: Literal["cpu", "cuda"] = "cuda"

    def rank(self, world: int) -> Rates:
        return Rates(
            bandwidth=self.bandwidth * self.bandwidth_share,
            operations={
                name: rate * self.operations_share for name, rate in self.operations.items()
            },
            half_rows=self.half_rows,
            call_s=self.call_s,
        )

    def memory(self, world: int) -> int:
        return self.memory_bytes

    def devices(self, world: int) -> int:
        return world


def _tensor_cores(
    float32: float, half: float, int8: float, fp8: float | None = None
) -> dict[Arithmetic, float]:
    """From Tflop/s. float32 is that of plain float32: PyTorch multiplies in TF32 only when told."""
    rates: dict[Arithmetic, float] = {
        "float32": float32 * 1e12,
        "bfloat16": half * 1e12,
        "float16": half * 1e12,
        "int8": int8 * 1e12,
    }
    return rates if fp8 is None else {**rates, "fp8": fp8 * 1e12}


_AMPERE = _tensor_cores(19.5, 312, 624)
_HOPPER_SXM = _tensor_cores(67, 989.5, 1979, 1979)


def _newer_than_ampere(
    name: str, memory: int, bandwidth: float, operations: dict[Arithmetic, float], link: str
) -> Accelerator:
    """Memory and tensor cores have become faster than what feeds them: programs attain less."""
    return Accelerator(
        name, memory, bandwidth, operations, link, bandwidth_share=0.7, operations_share=0.55
    )


_GB = 10**9

ACCELERATORS: Mapping[str, Accelerator] = {
    device.name: device
    for device in (
        # NVIDIA A100 Tensor Core GPU datasheet; the 80 GB one is the SXM module.
        Accelerator("a100-40", 40 * _GB, 1.555e12, _AMPERE, "nvlink3"),
        Accelerator("a100-80", 80 * _GB, 2.039e12, _AMPERE, "nvlink3"),
        # NVIDIA H100 Tensor Core GPU datasheet: SXM5, and the PCIe card of 350 W.
        _newer_than_ampere("h100-sxm", 80 * _GB, 3.35e12, _HOPPER_SXM, "nvlink4"),
        _newer_than_ampere(
            "h100-pcie", 80 * _GB, 2.0e12, _tensor_cores(51, 756.5, 1513, 1513), "pcie5"
        ),
        # NVIDIA H200 Tensor Core GPU datasheet, SXM.
        _newer_than_ampere("h200", 141 * _GB, 4.8e12, _HOPPER_SXM, "nvlink4"),
        # NVIDIA HGX B200 datasheet, an eighth of the board.
        _newer_than_ampere(
            "b200", 180 * _GB, 7.7e12, _tensor_cores(75, 2250, 4500, 4500), "nvlink5"
        ),
        # AMD Instinct MI300X accelerator data sheet.
        Accelerator(
            "mi300x",
            192 * _GB,
            5.3e12,
            _tensor_cores(163.4, 1307.4, 2614.9, 2614.9),
            "infinity-fabric",
            bandwidth_share=0.65,
            operations_share=0.45,
        ),
        # NVIDIA L4 Tensor Core GPU datasheet. At 72 W its clocks fall under load.
        Accelerator(
            "l4",
            24 * _GB,
            300e9,
            _tensor_cores(30.3, 121, 242.5, 242.5),
            "pcie4",
            bandwidth_share=0.8,
            operations_share=0.5,
        ),
    )
}


def accelerator(name: str) -> Accelerator:
    """The one of that name; `CannotPredict` where the catalogue has none."""
    if name not in ACCELERATORS:
        raise CannotPredict(f"device {name}: use cpu, or one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]
