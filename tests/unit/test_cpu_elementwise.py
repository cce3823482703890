"""What stands between the matmuls on the CPU: norms, activations, rotation, rows, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_launch import launch

from shards.kernels.base import Gating, Norm
from shards.kernels.cpu.activations import activate
from shards.kernels.cpu.kernel import Header, Instruction
from shards.kernels.cpu.norms import norm
from shards.kernels.cpu.paged_cache import allocate_cache
from shards.kernels.cpu.reductions import sum_exponentials, top_k
from shards.kernels.cpu.rotary import angles, rotate_and_cache
from shards.kernels.cpu.rows import add, add_positions, gather_rows
from shards.models.spec import Activation

Program = tuple[Instruction, ...]
threads_1_3 = pytest.mark.parametrize("threads", [1, 3])
# A few vectors of any width and a rest, less than a vector, whole vectors.
widths = pytest.mark.parametrize("width", [77, 3, 64])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestNorms:
    @threads_1_3
    @widths
    @pytest.mark.parametrize("bias", [False, True])
    def test_rms(self, width: int, threads: int, bias: bool) -> None:
        x, weight = random(7, width), random(width, seed=1)
        added = random(width, seed=2) if bias else None
        y = torch.full((9, width), math.nan)
        launch(norm(Norm("rms", 1e-5, weight, added), x, y), threads, rows=7)
        expected = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
        expected = expected + added if added is not None else expected
        torch.testing.assert_close(y[:7].double(), expected, rtol=1e-6, atol=1e-6)
        assert y[7:].isnan().all()

    @threads_1_3
    @widths
    @pytest.mark.parametrize("bias", [False, True])
    def test_layer(self, width: int, threads: int, bias: bool) -> None:
        x, weight = random(7, width) + 5, random(width, seed=1)
        added = random(width, seed=2) if bias else None
        y = torch.empty(7, width)
        launch(norm(Norm("layer", 1e-5, weight, added), x, y), threads, rows=7)
        expected = F.layer_norm(
            x.double(),
            (width,),
            weight.double(),
            None if added is None else added.double(),
            1e-5,
        )
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=3e-6)

    @pytest.mark.parametrize("kind", ["rms", "layer"])
    def test_in_place_and_alone_a_row_has_the_same_bits(self, kind: str) -> None:
        x, weight = random(7, 77), random(77, seed=1)
        y = torch.empty_like(x)
        launch(norm(Norm(kind, 1e-6, weight), x, y), rows=7)
        alone = x[4:5].clone()
        launch(norm(Norm(kind, 1e-6, weight), alone, alone), rows=1)
        assert torch.equal(alone, y[4:5])

    def test_counts_the_rows_it_is_told_to(self) -> None:
        x = random(5, 64)
        before = x.clone()
        program = norm(Norm("rms", 1e-6, torch.ones(64)), x, x, rows=Header.SAMPLED)
        launch(program, rows=5, sampled=2)
        assert torch.equal(x[2:], before[2:])
        assert not torch.equal(x[:2], before[:2])


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
class TestActivations:
    @threads_1_3
    @widths
    def test_gated(self, name: Activation, width: int, threads: int) -> None:
        x = 4 * random(7, 2 * width)
        y = torch.full((8, width), math.nan)
        launch(activate(Gating(name, gated=True), x, y), threads, rows=7)
        gate, up = x.double().chunk(2, dim=1)
        torch.testing.assert_close(
            y[:7].double(), ACTIVATIONS[name](gate) * up, rtol=1e-6, atol=1e-5
        )
        assert y[7].isnan().all()

    @threads_1_3
    def test_alone(self, name: Activation, threads: int) -> None:
        """Over the whole range, to float32's own error."""
        x = torch.linspace(-30, 30, 7 * 77).view(7, 77)
        expected = ACTIVATIONS[name](x.double())
        launch(activate(Gating(name, gated=False), x, x), threads, rows=7)
        torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)

    def test_at_the_ends(self, name: Activation) -> None:
        x = torch.tensor([[1e30, 3e38, math.inf, 0.0, -0.0, -100.0, -1e30, math.nan]])
        launch(activate(Gating(name, gated=False), x, x), rows=1)
        assert x[0, :3].tolist() == [float(torch.tensor(1e30)), float(torch.tensor(3e38)), math.inf]
        assert (x[0, 3:7] == 0).all()
        assert x[0, 7].isnan()


def test_gate_and_up_must_fit_the_channels() -> None:
    with pytest.raises(ValueError, match="gate and up of 8 channels in rows of 24"):
        activate(Gating("silu", gated=True), torch.zeros(1, 24), torch.zeros(1, 8))


POSITIONS = torch.tensor([0, 1, 17, 4095, 131_071, 1_000_000, 33])


class TestRotation:
    @threads_1_3
    def test_angles_are_those_of_torch(self, threads: int) -> None:
        """cos and sin of the float32 product, to float32's last place."""
        inverse = 1 / 10_000 ** (torch.arange(0, 40, 2) / 40)
        cos, sin = torch.empty(2, 7, 20)
        launch(angles(POSITIONS, inverse, cos, sin, factor=1.5), threads, rows=7)
        angle = (POSITIONS[:, None].float() * inverse).double()
        torch.testing.assert_close(cos.double(), angle.cos() * 1.5, rtol=0, atol=2e-7)
        torch.testing.assert_close(sin.double(), angle.sin() * 1.5, rtol=0, atol=2e-7)

    @threads_1_3
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "head_dim", "turned"),
        [(5, 2, 64, 64), (3, 3, 80, 32), (2, 1, 20, 20), (9, 3, 8, 6)],
    )
    def test_rotates_and_caches(
        self, heads: int, kv_heads: int, head_dim: int, turned: int, interleaved: bool, threads: int
    ) -> None:
        qkv = random(7, (heads + 2 * kv_heads) * head_dim)
        angle = random(7, 1, turned // 2, seed=1)
        turn = (angle.cos().flatten(1), angle.sin().flatten(1))
        blocks, offsets = torch.tensor([3, 0, 3, 1, 1, 2, 2]), torch.tensor([0, 4, 1, 2, 3, 0, 4])
        cache = allocate_cache(4, kv_heads, 5, head_dim, torch.float32)
        q, k, v = (
            part.unflatten(1, (-1, head_dim)).clone()
            for part in qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], 1)
        )
        program = rotate_and_cache(
            qkv,
            cache,
            heads=heads,
            blocks=blocks,
            offsets=offsets,
            turn=turn,
            interleaved=interleaved,
        )
        launch(program, threads, rows=7)

        def rotated(x: torch.Tensor) -> torch.Tensor:
            pairs = x[..., :turned].unflatten(-1, (-1, 2) if interleaved else (2, -1))
            a, b = pairs.unbind(-1 if interleaved else -2)
            parts = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
            whole = torch.stack(parts, -1 if interleaved else -2).flatten(-2)
            return torch.cat((whole, x[..., turned:]), -1)

        torch.testing.assert_close(qkv[:, : heads * head_dim], rotated(q).flatten(1))
        torch.testing.assert_close(cache.keys[blocks, :, offsets], rotated(k))
        assert torch.equal(cache.values[blocks, :, offsets], v)
        cache.keys[blocks, :, offsets] = 0
        cache.values[blocks, :, offsets] = 0
        assert not cache.keys.any()
        assert not cache.values.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_without_positions_only_caches_what_the_dtype_holds(self, dtype: torch.dtype) -> None:
        qkv = random(1, 4 * 16)
        odd = [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 65_519.0, 65_520.0, 1e-41]
        qkv[0, 48:56] = torch.tensor(odd)
        before = qkv.clone()
        cache = allocate_cache(1, 1, 16, 16, dtype)
        zero = torch.zeros(1, dtype=torch.int64)
        program = rotate_and_cache(
            qkv, cache, heads=2, blocks=zero, offsets=zero, turn=None, interleaved=False
        )
        launch(program, rows=1)
        torch.testing.assert_close(qkv, before, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(cache.keys[0, 0, 0], before[0, 32:48].to(dtype))
        assert torch.equal(cache.values[0, 0, 0], before[0, 48:64].to(dtype).nan_to_num())

    def test_a_buffer_of_another_width_is_refused(self) -> None:
        cache = allocate_cache(1, 2, 16, 8, torch.float32)
        zero = torch.zeros(1, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"rows of 48, but 4 heads and twice 2 KV heads of 8"):
            rotate_and_cache(
                torch.zeros(1, 48),
                cache,
                heads=4,
                blocks=zero,
                offsets=zero,
                turn=None,
                interleaved=False,
            )


class TestRows:
    @threads_1_3
    @widths
    def test_add(self, width: int, threads: int) -> None:
        x, y, bias = random(7, width), random(7, width, seed=1), random(width, seed=2)
        expected = x + y
        launch(add(x, y), threads, rows=7)
        assert torch.equal(x, expected)
        launch(add(x, y, bias=bias), threads, rows=5)
        torch.testing.assert_close(x[:5], expected[:5] + y[:5] + bias)
        assert torch.equal(x[5:], expected[5:])

    @threads_1_3
    @widths
    def test_positions(self, width: int, threads: int) -> None:
        x, table = random(4, width), random(20, width, seed=1)
        positions = torch.tensor([17, 0, 3, 3])
        expected = x + table[positions + 2]
        launch(add_positions(x, table, positions, offset=2), threads, rows=4)
        assert torch.equal(x, expected)

    @threads_1_3
    @widths
    def test_gather(self, width: int, threads: int) -> None:
        x, indices = random(9, width), torch.tensor([8, 0, 3, 3, 5])
        y = torch.full((5, width), math.nan)
        launch(gather_rows(x, indices, y), threads, rows=9, sampled=4)
        assert torch.equal(y[:4], x[indices[:4]])
        assert y[4].isnan().all()

    def test_another_dtype_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"torch.float32 and torch.bfloat16"):
            add(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bfloat16))


class TestReductions:
    @staticmethod
    def largest(
        logits: torch.Tensor, k: int, threads: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(logits)
        values, indices = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
        launch(top_k(logits, values, indices), threads, sampled=rows)
        return values, indices

    @threads_1_3
    @pytest.mark.parametrize("k", [1, 20, 49])
    @pytest.mark.parametrize("width", [49, 1000])
    def test_top_k(self, width: int, k: int, threads: int) -> None:
        logits = random(7, width)
        values, indices = self.largest(logits, k, threads)
        expected = logits.topk(k)
        assert torch.equal(values, expected.values)
        assert torch.equal(indices, expected.indices)

    def test_of_equals_the_first_comes_first(self) -> None:
        logits = torch.zeros(3, 100)
        logits[1, [99, 41, 40]] = 2.0
        logits[2] = -math.inf
        _, indices = self.largest(logits, 4)
        assert indices.tolist() == [[0, 1, 2, 3], [40, 41, 99, 0], [0, 1, 2, 3]]

    def test_nan_comes_before_all_numbers(self) -> None:
        logits = random(2, 100)
        logits[0, [70, 30]] = math.nan
        logits[0, 5] = math.inf
        values, indices = self.largest(logits, 3)
        assert indices[0].tolist() == [30, 70, 5]
        assert values[0, :2].isnan().all()
        assert torch.equal(indices[:, 0], logits.argmax(1))

    def test_no_more_than_there_are(self) -> None:
        with pytest.raises(ValueError, match="the 5 largest of 4 logits"):
            self.largest(torch.zeros(1, 4), 5)

    @threads_1_3
    def test_log_sum_exp(self, threads: int) -> None:
        logits = 10 * random(7, 1003) + 300
        values, _ = self.largest(logits, 2)
        sums = torch.empty(7)
        launch(sum_exponentials(logits, values, sums), threads, sampled=7)
        expected = logits.double().logsumexp(1)
        torch.testing.assert_close(
            values[:, 0].double() + sums.double().log(), expected, rtol=0, atol=1e-5
        )
