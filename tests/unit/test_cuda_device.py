"""A device that cannot do what it is asked to is refused before anything is loaded onto it."""

from __future__ import annotations

import pytest
import torch

from shards.collectives.symmetric_memory import LARGEST_BYTES, ONE_SHOT_BYTES, algorithm
from shards.kernels.cuda import CudaKernels
from shards.kernels.cuda.device import DeviceError

CUDA = torch.device("cuda")


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, of compute capability 7.5 and 8.6."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: ((7, 5), (8, 6))[device.index or 0]
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_torch_without_cuda() -> None:
    with pytest.raises(DeviceError, match="built without CUDA; install a CUDA build of torch"):
        CudaKernels(CUDA, torch.float16)


def test_no_gpu_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"):
        CudaKernels(CUDA, torch.float16)


def test_another_kind_of_device() -> None:
    with pytest.raises(DeviceError, match=r"device=meta: .* use cuda or cpu"):
        CudaKernels(torch.device("meta"), torch.float16)


@pytest.mark.usefixtures("ampere")
def test_an_index_beyond_the_gpus_there_are() -> None:
    with pytest.raises(DeviceError, match=r"device=cuda:2: this process sees 2 GPUs; use cuda:0"):
        CudaKernels(torch.device("cuda:2"), torch.float16)


@pytest.mark.usefixtures("ampere")
def test_a_dtype_that_the_gpu_does_not_compute() -> None:
    with pytest.raises(DeviceError, match=r"Tesla T4 \(compute capability 7.5\).*dtype=float16"):
        CudaKernels(torch.device("cuda:0"), torch.bfloat16)
    with pytest.raises(DeviceError, match=r"fp8: .* from 8.9 on; use int8 or int4"):
        CudaKernels(torch.device("cuda:1"), torch.bfloat16, quantize_to_float8=True)


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cuda", torch.float16), ("cuda:0", torch.float32), ("cuda:1", torch.bfloat16)],
)
def test_what_the_gpu_can_do(device: str, dtype: torch.dtype) -> None:
    CudaKernels(torch.device(device), dtype)


BF16_ROW = torch.empty(4, 1024, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "world", "multicast", "how"),
    [
        (BF16_ROW, 2, False, "one_shot"),
        (BF16_ROW, 8, False, "one_shot"),
        (BF16_ROW, 3, False, "two_shot"),  # one shot would add in another order on each rank
        (BF16_ROW, 8, True, "multimem"),
        (BF16_ROW.float(), 2, False, "one_shot"),
        (BF16_ROW.half(), 2, False, None),  # there are no kernels for float16
        (torch.empty(ONE_SHOT_BYTES // 4), 2, False, "one_shot"),
        (torch.empty(ONE_SHOT_BYTES // 4 + 4), 2, False, "two_shot"),
        (torch.empty(LARGEST_BYTES // 4), 2, False, "two_shot"),
        (torch.empty(LARGEST_BYTES // 4 + 4), 2, False, None),
        (torch.empty(0), 2, False, None),
        (torch.empty(3), 2, False, None),  # not whole loads of 16 bytes
        (torch.empty(9)[1:], 2, True, None),  # nor at a multiple of them
    ],
)
def test_which_sums_take_symmetric_memory(
    x: torch.Tensor, world: int, multicast: bool, how: str | None
) -> None:
    assert algorithm(x, world, multicast=multicast) == how
