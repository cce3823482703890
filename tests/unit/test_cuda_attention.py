"""Attention through FlashInfer and FlashAttention, in whose place stand modules that compute the
same from the same arguments; and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shards.errors import UnsupportedModel
from shards.kernels.base import Pattern
from shards.kernels.cuda import CudaKernels
from shards.kernels.cuda.attention import AttentionBackend, Geometry, choice, choose
from shards.kernels.cuda.attention.flash_attention import FlashAttention
from shards.kernels.cuda.attention.flashinfer import FlashInfer
from shards.kernels.cuda.attention.groups import groups_of
from shards.kernels.cuda.attention.sdpa import Sdpa
from shards.kernels.reference import ReferenceKernels
from tests.unit import cuda_ranks as ranks
from tests.unit.cuda_ranks import CPU, install

CUDA = torch.device("cuda")
Tensor = torch.Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window_left: int) -> Tensor:
    """q [rows, N, H], the last positions of k and v [context, K, H], GQA in whole groups."""
    rows, heads, _ = q.shape
    context, kv_heads, _ = k.shape
    assert heads % kv_heads == 0
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    at_q = torch.arange(context - rows, context)[:, None]
    at_k = torch.arange(context)
    seen = at_k <= at_q
    if window_left >= 0:
        seen &= at_k >= at_q - window_left
    scores = torch.einsum("tnh,cnh->ntc", q, k) * scale
    return torch.einsum("ntc,cnh->tnh", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


class Wrapper:
    """What FlashInfer's two wrappers have in common."""

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert workspace.dtype == torch.uint8
        assert not workspace.any()
        assert kv_layout == "HND"

    def keep(self, *shape: int, window_left: int, sm_scale: float, **dtypes: torch.dtype) -> None:
        assert dtypes.keys() == {"q_data_type", "kv_data_type"}
        self.shape, self.window_left, self.scale = shape, window_left, sm_scale

    def spans(self, q: Tensor, caches: tuple[Tensor, Tensor], lists: tuple[Tensor, ...]) -> Tensor:
        row_starts, starts, indices, last_lengths = lists
        heads, kv_heads, head_dim, page_size = self.shape
        assert q.shape[1:] == (heads, head_dim)
        parts = []
        for s in range(len(last_lengths)):
            pages = indices[int(starts[s]) : int(starts[s + 1])].long()
            context = (len(pages) - 1) * page_size + int(last_lengths[s])
            k, v = (pool[pages].transpose(1, 2).flatten(0, 1)[:context] for pool in caches)
            assert k.shape[1:] == (kv_heads, head_dim)
            rows = q[int(row_starts[s]) : int(row_starts[s + 1])]
            parts.append(attention(rows, k, v, self.scale, self.window_left))
        return torch.cat(parts)


class DecodeWrapper(Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str,
        *,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: Tensor,
        paged_kv_indices_buffer: Tensor,
        paged_kv_last_page_len_buffer: Tensor,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_cuda_graph
        self.tensor_cores = use_tensor_cores
        self.starts = paged_kv_indptr_buffer
        self.indices = paged_kv_indices_buffer
        self.last_lengths = paged_kv_last_page_len_buffer

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, *shape: int, **options: Any
    ) -> None:
        assert indptr.device == last_page_len.device == CPU
        assert {indptr.dtype, indices.dtype, last_page_len.dtype} == {torch.int32}
        self.starts.copy_(indptr)
        self.indices[: len(indices)].copy_(indices)
        self.last_lengths.copy_(last_page_len)
        self.keep(*shape, **options)
        groups = self.shape[0] // self.shape[1]
        assert self.tensor_cores or groups in (1, 2, 3)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert len(q) == len(self.last_lengths)
        rows = torch.arange(len(q) + 1)
        lists = (rows, self.starts, self.indices, self.last_lengths)
        return self.spans(q, paged_kv_cache, lists)


class PrefillWrapper(Wrapper):
    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        *shape: int,
        causal: bool,
        **options: Any,
    ) -> None:
        assert causal
        self.lists = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert {each.dtype for each in self.lists} == {torch.int32}
        self.keep(*shape, **options)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self.spans(q, paged_kv_cache, self.lists)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    assert {cache_seqlens.dtype, page_table.dtype, cu_seqlens_q.dtype} == {torch.int32}
    assert causal
    assert window_size[1] == (-1 if window_size[0] < 0 else 0)
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
    parts = []
    for s, context in enumerate(cache_seqlens.tolist()):
        k, v = (
            pool[page_table[s, : -(-context // pool.shape[1])].long()].flatten(0, 1)[:context]
            for pool in (k_cache, v_cache)
        )
        rows = q[int(cu_seqlens_q[s]) : int(cu_seqlens_q[s + 1])]
        parts.append(attention(rows, k, v, softmax_scale, window_size[0]))
    return torch.cat(parts)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        "flashinfer",
        BatchDecodeWithPagedKVCacheWrapper=DecodeWrapper,
        BatchPrefillWithPagedKVCacheWrapper=PrefillWrapper,
    )
    install(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=flash_attn_with_kvcache)


SPECS = {
    "whole groups": ranks.llama(),
    "large groups": ranks.llama(heads=8, kv_heads=1),
    "window": ranks.llama(window=11),
    "MHA": ranks.gpt2(),
}


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("world", [1, 4])  # of 6 heads over 2 KV heads, 4 ranks cut groups
@pytest.mark.parametrize("backend", [FlashInfer, FlashAttention, Sdpa])
@pytest.mark.parametrize("name", SPECS)
def test_backends_compute_what_the_reference_does(
    name: str, backend: Callable[[Geometry], AttentionBackend], world: int
) -> None:
    spec = SPECS[name]
    geometry = ranks.geometry(spec)
    found = ranks.run(
        spec,
        CudaKernels(CPU, torch.float32),
        torch.float32,
        world=world,
        executor=ranks.Captured(backend(geometry), geometry, ranks.again),
    )
    expected = ranks.run(spec, ReferenceKernels(CPU, torch.float64), torch.float64)
    assert ranks.error(found, expected) < 5e-6


def test_cut_groups_are_filled_up() -> None:
    groups = groups_of(Pattern((0, 1, 1, 1, 2, 2), 1.0), CPU)
    assert (groups.kv_heads, groups.size, groups.heads) == (3, 3, 9)
    q = torch.arange(1.0, 13).view(1, 6, 2)
    spread = groups.spread(q)
    assert spread[0, :, 0].tolist() == [1, 0, 0, 3, 5, 7, 9, 11, 0]
    assert torch.equal(groups.collect(spread), q)


def test_whole_groups_are_left_as_they_are() -> None:
    groups = groups_of(Pattern((0, 0, 1, 1), 1.0), CPU)
    q = torch.randn(3, 4, 2)
    assert groups.spread(q) is q
    assert groups.collect(q) is q


def geometry(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Geometry:
    return Geometry(frozenset({head_dim}), 16, 128, dtype, CUDA)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        FlashInfer, "__init__", lambda self, geometry: None
    )  # its workspace is CUDA memory


@pytest.mark.usefixtures("libraries", "hopper")
@pytest.mark.parametrize(
    ("wanted", "geometry", "chosen"),
    [
        ("auto", geometry(), "flashinfer"),
        ("auto", geometry(head_dim=80), "flash_attention"),
        ("auto", geometry(head_dim=100), "sdpa"),
        ("auto", geometry(dtype=torch.float32), "sdpa"),
        ("flash_attention", geometry(), "flash_attention"),
        ("sdpa", geometry(), "sdpa"),
    ],
)
def test_the_best_that_can_serve_is_taken(
    wanted: choice.AttentionName, geometry: Geometry, chosen: str
) -> None:
    assert choose(wanted, geometry).name == chosen


@pytest.mark.usefixtures("libraries", "hopper")
def test_what_is_not_installed_is_passed_over_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: name == "flash_attn_interface" or None)
    assert choose("auto", geometry()).name == "flash_attention"
    assert "the module flashinfer is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "geometry", "reason"),
    [
        ("flashinfer", geometry(), "attention=flashinfer: the module flashinfer is not installed"),
        ("flashinfer", ranks.geometry(ranks.llama()), "it runs on CUDA, not on cpu"),
        ("flash_attention", geometry(), "flash_attn_interface is not installed"),
    ],
)
def test_what_cannot_serve_is_refused(
    wanted: choice.AttentionName,
    geometry: Geometry,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModel, match=f"{reason}.*; use attention=auto"):
        choose(wanted, geometry)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("wanted", "geometry", "capability", "reason"),
    [
        ("flashinfer", geometry(head_dim=80), (9, 0), "head_dim 80 is none of 64, 128, 256"),
        ("flashinfer", geometry(dtype=torch.float32), (9, 0), "16 bits, not in torch.float32"),
        ("flash_attention", geometry(head_dim=100), (9, 0), "head_dim 100 is no multiple of 8"),
        ("flash_attention", geometry(head_dim=512), (9, 0), "head_dim 512"),
        ("flash_attention", geometry(dtype=torch.float32), (9, 0), "16 bits"),
        ("flash_attention", geometry(), (8, 0), "compute capability 9.0"),
    ],
)
def test_a_library_says_what_it_cannot_compute(
    wanted: choice.AttentionName,
    geometry: Geometry,
    capability: tuple[int, int],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UnsupportedModel, match=reason):
        choose(wanted, geometry)


def test_sdpa_is_captured_where_whole_tables_are_short() -> None:
    sdpa = Sdpa(geometry())  # 128 blocks of 16 tokens
    assert sdpa.captures(16)
    assert not sdpa.captures(17)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("backend", [FlashInfer, Sdpa])
def test_attention_before_a_plan_is_refused(
    backend: Callable[[Geometry], AttentionBackend],
) -> None:
    spec = ranks.llama()
    kernels = CudaKernels(CPU, torch.float32)
    cache = kernels.allocate(4, 2, ranks.BLOCK, 16)
    step = backend(ranks.geometry(spec)).captured(1)
    with pytest.raises(RuntimeError, match="before a plan"):
        step.attend(torch.zeros(1, 6, 16), Pattern((0, 0, 0, 1, 1, 1), 0.25), cache)
