"""What is particular to one transport: choosing it, joining it, and the shared-memory kernel."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shards.collectives import choose, connect
from shards.collectives.gloo import Gloo
from shards.collectives.local import Local
from shards.collectives.nccl import Nccl
from shards.collectives.rendezvous import host_store, local_address
from shards.collectives.segment import abort_segment, create_segment, segment_size
from shards.collectives.shared_memory import SharedMemory
from shards.errors import CollectiveAborted, CollectiveError, CollectiveTimeout


@pytest.fixture
def segment() -> Iterator[int]:
    fd = create_segment(2, 1 << 16)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("name", "world", "device", "one_host", "chosen"),
    [
        ("auto", 1, "cpu", True, "local"),
        ("auto", 1, "cuda:1", True, "local"),
        ("gloo", 1, "cpu", True, "local"),
        ("auto", 2, "cpu", True, "shared_memory"),
        ("auto", 2, "cpu", False, "gloo"),
        ("auto", 2, "cuda", True, "nccl"),
        ("auto", 2, "cuda:0", False, "nccl"),
        ("shared_memory", 9, "cpu", True, "shared_memory"),
        ("gloo", 2, "cpu", True, "gloo"),
        ("nccl", 2, "cuda", False, "nccl"),
        ("symmetric_memory", 2, "cuda", True, "symmetric_memory"),
    ],
)
def test_choice(name: str, world: int, device: str, one_host: bool, chosen: str) -> None:
    assert choose(name, world=world, device=device, one_host=one_host) == chosen


@pytest.mark.parametrize(
    ("name", "world", "device", "one_host", "named"),
    [
        ("shared_memory", 2, "cpu", False, "one host"),
        ("shared_memory", 2, "cuda", True, "cuda"),
        ("gloo", 2, "cuda:3", True, "cuda:3"),
        ("nccl", 2, "cpu", True, "cpu"),
        ("symmetric_memory", 2, "cuda", False, "one host"),
        ("nccl", 1, "cpu", True, "cpu"),
        ("local", 2, "cpu", True, "world is 2"),
        ("mpi", 2, "cpu", True, "'mpi'"),
        ("auto", 2, "tpu", True, "'tpu'"),
        ("auto", 0, "cpu", True, "world=0"),
    ],
)
def test_a_choice_that_cannot_work_is_refused(
    name: str, world: int, device: str, one_host: bool, named: str
) -> None:
    with pytest.raises(CollectiveError, match=named):
        choose(name, world=world, device=device, one_host=one_host)


def test_connect_makes_what_was_chosen(segment: int) -> None:
    local = connect("local", rank=0, world=1, epoch=1, deadline_s=1)
    assert isinstance(local, Local)
    shared = connect("shared_memory", rank=1, world=2, epoch=1, deadline_s=1, segment=segment)
    assert isinstance(shared, SharedMemory)
    shared.close()
    _store, address = host_store()
    gloo = connect("gloo", rank=0, world=1, epoch=1, deadline_s=5, rendezvous=address)
    assert isinstance(gloo, Gloo)
    gloo.close()


def test_connect_refuses_what_is_missing(segment: int) -> None:
    with pytest.raises(CollectiveError, match="descriptor"):
        connect("shared_memory", rank=0, world=2, epoch=1, deadline_s=1)
    with pytest.raises(CollectiveError, match="host:port"):
        connect("gloo", rank=0, world=2, epoch=1, deadline_s=1, rendezvous="nowhere")
    with pytest.raises(CollectiveError, match="world is 2"):
        connect("local", rank=0, world=2, epoch=1, deadline_s=1)
    with pytest.raises(CollectiveError, match="rank=2"):
        connect("shared_memory", rank=2, world=2, epoch=1, deadline_s=1, segment=segment)
    with pytest.raises(CollectiveError, match="deadline_s=0"):
        connect("shared_memory", rank=0, world=2, epoch=1, deadline_s=0, segment=segment)


def test_local_is_the_identity_and_its_gathers_are_copies() -> None:
    local = Local()
    x = torch.arange(6.0).reshape(2, 3)
    assert local.all_reduce(x) is x
    assert local.broadcast(x) is x
    joined = local.all_gather(x, [3])
    assert torch.equal(joined, x)
    joined.zero_()
    assert x.sum() == 15
    local.abort()
    with pytest.raises(CollectiveAborted):
        local.barrier()


def test_a_segment_has_no_name_and_a_sealed_size(segment: int) -> None:
    assert os.readlink(f"/proc/self/fd/{segment}").startswith("/memfd:")
    assert os.fstat(segment).st_size == segment_size(2, 1 << 16)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(segment, size)


@pytest.mark.parametrize(("world", "capacity"), [(0, 4096), (5000, 4096), (2, 0)])
def test_a_segment_of_nonsense_is_refused(world: int, capacity: int) -> None:
    with pytest.raises(CollectiveError):
        segment_size(world, capacity)


def test_a_descriptor_that_is_no_segment_is_refused(segment: int, tmp_path: Path) -> None:
    with pytest.raises(CollectiveError, match="made for 2 ranks"):
        SharedMemory(segment, 0, 3, 1.0)
    other = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(other, mmap.PAGESIZE)
    with pytest.raises(CollectiveError, match="create_segment"):
        SharedMemory(other, 0, 2, 1.0)
    os.close(other)
    with pytest.raises(CollectiveError, match="cannot be read"):
        SharedMemory(other, 0, 2, 1.0)


def test_a_segment_serves_one_group_only(segment: int) -> None:
    first = SharedMemory(segment, 0, 2, 0.05)
    with pytest.raises(CollectiveTimeout):
        first.barrier()
    with pytest.raises(CollectiveError, match="used"):
        SharedMemory(segment, 0, 2, 0.05)


def test_a_rank_that_maps_an_aborted_segment_hears_of_it(segment: int) -> None:
    abort_segment(segment)
    with pytest.raises(CollectiveAborted):
        SharedMemory(segment, 0, 2, 60.0).barrier()


def _sum_of_two(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    fd = create_segment(2)
    ranks = [SharedMemory(fd, rank, 2, 20.0) for rank in range(2)]
    other = threading.Thread(target=ranks[1].all_reduce, args=(b.clone(),))
    other.start()
    total = ranks[0].all_reduce(a.clone())
    other.join()
    for rank in ranks:
        rank.close()
    os.close(fd)
    return total


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_sums_are_rounded_once_for_every_bit_pattern(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    shuffled = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1))]
    for other in (torch.zeros_like(every), every, shuffled):
        expected = (every.float() + other.float()).to(dtype)
        result = _sum_of_two(every, other)
        assert torch.equal(result.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(result[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_joining_without_the_others_names_who_is_missing() -> None:
    _store, address = host_store()
    with pytest.raises(CollectiveTimeout) as raised:
        Gloo(address, 1, 0, 2, 0.3)
    assert raised.value.rank == 1


def test_a_store_out_of_reach_is_an_error() -> None:
    with pytest.raises(CollectiveError, match=r"127\.0\.0\.1:9"):
        Gloo("127.0.0.1:9", 1, 0, 2, 0.3)
    with pytest.raises(CollectiveError, match="cannot listen"):
        host_store("203.0.113.1")


def test_the_store_listens_on_the_host_it_was_given() -> None:
    _store, address = host_store("127.0.0.1")
    port = f"{int(address.rpartition(':')[2]):04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()
    addresses = {line.split()[1] for line in lines[1:] if line.split()[3] == "0A"}
    assert f"0100007F:{port}" in addresses
    assert f"00000000:{port}" not in addresses
    assert local_address(address) == "127.0.0.1"


def test_nccl_is_refused_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(CollectiveError, match="sees no GPU"):
        Nccl("127.0.0.1:1", 1, 0, 2, 1.0, torch.device("cuda:0"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: none here")
def test_nccl_group_of_one() -> None:
    _store, address = host_store()
    group = Nccl(address, 1, 0, 1, 20.0, torch.device("cuda:0"))
    x = torch.arange(5.0, device="cuda:0")
    group.all_reduce(x)
    joined = group.all_gather(x, [5])
    group.barrier()
    assert torch.equal(joined.cpu(), torch.arange(5.0))
    group.abort()
    with pytest.raises(CollectiveAborted):
        group.barrier()
    group.close()
