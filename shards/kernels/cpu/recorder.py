"""Takes sentences down as instructions on buffers that outlive the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch

from shards.collectives.base import Collective
from shards.collectives.shared_memory import SharedMemory
from shards.kernels.base import (
    Embedding,
    Experts,
    Gating,
    Head,
    HeadNorms,
    Latent,
    Limits,
    Linear,
    Norm,
    Part,
    Pattern,
    PositionTable,
    Rotation,
)
from shards.kernels.cpu import activations, fallbacks, matrix, norms, reduce, rotary, rows
from shards.kernels.cpu.attention import attention
from shards.kernels.cpu.buffers import Buffers
from shards.kernels.cpu.experts import Pairs, add_weighed, each_expert, gather, routing
from shards.kernels.cpu.inputs import Inputs
from shards.kernels.cpu.kernel import Header, Instruction
from shards.kernels.cpu.logits import shape_logits
from shards.kernels.cpu.matrix import CpuMatrix
from shards.kernels.cpu.program import Step
from shards.kv_cache import LayerCache
from shards.timing import Phase


class Recorder:
    """`Sentences` about steps to come.

    A buffer belongs to a word of the sentences ("normed", "qkv"..) and is used by every layer in
    turn. `steps` are what a `Program` takes.
    """

    def __init__(
        self,
        inputs: Inputs,
        limits: Limits,
        collective: Collective,
        threads: int,
        *,
        integers: bool,
    ) -> None:
        self.steps: list[tuple[Phase, Step]] = []
        self._inputs = inputs
        self._limits = limits
        self._collective = collective
        self._threads = threads
        self._integers = integers
        self._buffers = Buffers(limits, threads)
        self._turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def check(self, status: int) -> None:
        """Only a collective's instruction ever fails."""
        if status != 0 and isinstance(self._collective, SharedMemory):
            self._collective.check(status)

    def embed(
        self, embedding: Embedding[CpuMatrix], positions: PositionTable | None
    ) -> torch.Tensor:
        projection = embedding.projection
        word = "hidden" if projection is None else "embedded"
        x_TD = self._buffers.rows(word, embedding.matrix.inputs)
        tokens = torch.from_numpy(self._inputs.tokens)
        self._add("embed", matrix.embed(embedding.matrix, tokens, x_TD, embedding.first))
        self._all_reduce(x_TD)
        if embedding.scale != 1.0:
            self._add("embed", rows.scale(x_TD, embedding.scale))
        if projection is not None:
            embedded = x_TD
            x_TD = self._buffers.rows("hidden", projection.outputs)
            self._linear("embed", Linear(projection), embedded, x_TD)
        if positions is not None:
            at = torch.from_numpy(self._inputs.positions)
            self._add(
                "embed",
                rows.add_positions(x_TD, positions.weight, at, offset=positions.offset),
            )
        if embedding.norm is not None:
            self._add("embed", norms.norm(embedding.norm, x_TD, x_TD))
        return x_TD

    def project(
        self,
        x_TD: torch.Tensor,
        norm: Norm | None,
        qkv: Linear[CpuMatrix],
        pattern: Pattern,
        head_norms: HeadNorms | None,
        rotation: Rotation | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        joined = self._buffers.rows("qkv", qkv.matrix.outputs)
        self._linear("attention", qkv, self._normed("attention", x_TD, norm), joined)
        if head_norms is not None:
            self._norm_heads(joined, pattern, cache.keys.shape[3], head_norms)
        turn = None if rotation is None else self._turn(rotation)
        self._add(
            "attention",
            rotary.rotate_and_cache(
                joined,
                cache,
                heads=pattern.heads,
                blocks=torch.from_numpy(self._inputs.blocks),
                offsets=torch.from_numpy(self._inputs.offsets),
                turn=turn,
                interleaved=rotation is not None and rotation.interleaved,
            ),
        )
        return joined[:, : pattern.heads * cache.keys.shape[3]]

    def attend(self, q_TN: torch.Tensor, pattern: Pattern, cache: LayerCache) -> torch.Tensor:
        out = self._buffers.rows("attended", q_TN.shape[1])
        if pattern.mask != "causal":
            call = fallbacks.attend(q_TN, out, pattern, cache, self._inputs.current)
            self.steps.append(("attention", call))
            return out
        self._add(
            "attention",
            attention(
                q_TN,
                out,
                cache,
                pattern,
                torch.from_numpy(self._inputs.spans),
                torch.from_numpy(self._inputs.tables),
                self._buffers.attention(cache.keys.shape[3]),
                softcap=pattern.softcap,
                sinks=pattern.sinks,
                slopes=pattern.slopes,
            ),
        )
        return out

    def attend_latent(
        self,
        x_TD: torch.Tensor,
        norm: Norm | None,
        latent: Latent[CpuMatrix],
        pattern: Pattern,
        rotation: Rotation,
        cache: LayerCache,
    ) -> torch.Tensor:
        width = cache.keys.shape[3]
        down = self._buffers.rows("latents", latent.down.matrix.outputs)
        self._linear("attention", latent.down, self._normed("attention", x_TD, norm), down)
        queries = down[:, :-width]
        if latent.query is not None:
            through = self._normed("attention", queries, latent.query_norm)
            queries = self._buffers.rows("queries", latent.query.matrix.outputs)
            self._linear("attention", latent.query, through, queries)
        heads, value_dim, _ = latent.value_up.shape
        out = self._buffers.rows("attended", heads * value_dim)
        call = fallbacks.attend_latent(
            queries,
            down[:, -width:],
            out,
            latent,
            pattern,
            rotation,
            self._turn(rotation),
            cache,
            self._inputs.current,
        )
        self.steps.append(("attention", call))
        return out

    def expand(
        self,
        x_TD: torch.Tensor,
        norm: Norm | None,
        up: Linear[CpuMatrix],
        gating: Gating,
        token_gate: CpuMatrix | None = None,
    ) -> torch.Tensor:
        normed_TD = self._normed("ffn", x_TD, norm)
        token_gates = None
        if token_gate is not None:
            token_gates = self._buffers.rows("token gates", 1)
            self._linear("ffn", Linear(token_gate), normed_TD, token_gates)
        raw = self._buffers.rows("expanded", up.matrix.outputs)
        self._linear("ffn", up, normed_TD, raw)
        h_TF = raw
        if gating.gated:
            h_TF = self._buffers.rows("channels", up.matrix.outputs // 2)
        self._add("ffn", activations.activate(gating, raw, h_TF, token_gates=token_gates))
        return h_TF

    def mix(
        self, x_TD: torch.Tensor, norm: Norm | None, experts: Experts[CpuMatrix]
    ) -> torch.Tensor:
        normed_TD = self._normed("ffn", x_TD, norm)
        logits_TE = self._buffers.rows("router", experts.router.outputs)
        self._linear("ffn", Linear(experts.router, experts.router_bias), normed_TD, logits_TE)
        pairs = self._buffers.pairs(experts.count, experts.choice.top_k)
        self.steps.append(("ffn", routing(experts, logits_TE, pairs)))
        mixed_TD = self._buffers.rows("mixed", x_TD.shape[1])
        self._add("ffn", rows.scale(mixed_TD, 0.0))
        each = [self._expert(experts, e, pairs, normed_TD, mixed_TD) for e in range(experts.count)]
        self._add("ffn", (each_expert(each, pairs, self._threads),))
        return mixed_TD

    def merge(
        self,
        x_TD: torch.Tensor,
        parts: Sequence[Part[CpuMatrix]],
        phase: Literal["attention", "ffn"],
        *,
        post_norm: Norm | None = None,
        scale: float = 1.0,
        stream_norm: Norm | None = None,
    ) -> torch.Tensor:
        self._merge(x_TD, parts, phase, post_norm, scale)
        if stream_norm is not None:
            self._add(phase, norms.norm(stream_norm, x_TD, x_TD))
        return x_TD

    def _merge(
        self,
        x_TD: torch.Tensor,
        parts: Sequence[Part[CpuMatrix]],
        phase: Phase,
        post_norm: Norm | None,
        scale: float,
    ) -> None:
        """x += scale * post_norm(the parts' sum over ranks)."""
        plain = post_norm is None and scale == 1.0
        if plain and self._collective.world == 1:
            for part in parts:
                if part.out is None:
                    self._add(phase, rows.add(x_TD, part.values))
                else:
                    self._linear(phase, part.out, part.values, x_TD, add=True)
            return
        # What is normed or scaled has its biases by then: they are in one rank's share of the sum.
        early = not plain and self._collective.rank == 0
        share_TD = self._share(parts, phase, with_biases=early)
        self._all_reduce(share_TD)
        if post_norm is not None:
            self._add(phase, norms.norm(post_norm, share_TD, share_TD))
        biases = [p.out.bias for p in parts if p.out is not None and p.out.bias is not None]
        bias = sum(biases[1:], biases[0]) if plain and biases else None
        self._add(phase, rows.add(x_TD, share_TD, bias=bias, factor=scale))

    def logits(self, x_TD: torch.Tensor, head: Head[CpuMatrix]) -> torch.Tensor:
        limit = self._limits.sampled
        rows_SD = self._buffers.rows("sampled", x_TD.shape[1], limit)
        logits_SV = self._buffers.rows("logits", head.linear.matrix.outputs, limit)
        at = torch.from_numpy(self._inputs.sampled)
        self._add("output", rows.gather_rows(x_TD, at, rows_SD))
        if head.norm is not None:
            self._add("output", norms.norm(head.norm, rows_SD, rows_SD, rows=Header.SAMPLED))
        if head.projection is not None:
            narrow = self._buffers.rows("narrowed", head.projection.outputs, limit)
            projection = Linear(head.projection)
            self._linear("output", projection, rows_SD, narrow, counted=Header.SAMPLED)
            rows_SD = narrow
        self._linear("output", head.linear, rows_SD, logits_SV, counted=Header.SAMPLED)
        if head.scale != 1.0 or head.softcap is not None:
            self._add("output", shape_logits(logits_SV, head.scale, head.softcap))
        return logits_SV

    def _norm_heads(
        self, joined: torch.Tensor, pattern: Pattern, head_dim: int, given: HeadNorms
    ) -> None:
        if given.joint is not None:
            call = fallbacks.norm_joint_heads(joined, pattern, head_dim, given, self._collective)
            self.steps.append(("attention", call))
            return
        middle = pattern.heads * head_dim
        end = middle + pattern.kv_heads * head_dim
        self._add("attention", norms.norm_heads(given.q, joined[:, :middle], pattern.heads))
        self._add("attention", norms.norm_heads(given.k, joined[:, middle:end], pattern.kv_heads))

    def _expert(
        self,
        experts: Experts[CpuMatrix],
        e: int,
        pairs: Pairs,
        x_TD: torch.Tensor,
        sums_TD: torch.Tensor,
    ) -> list[Instruction]:
        """What is done for the rows of one expert."""
        up, down = experts.up.expert(e), experts.down.expert(e)
        up_bias, down_bias = (
            None if bias is None else bias[e] for bias in (experts.up_bias, experts.down_bias)
        )
        x = self._buffers.rows("expert's tokens", x_TD.shape[1])
        raw = h = self._buffers.rows("expert's expanded", up.outputs)
        if experts.gating.gated:
            h = self._buffers.rows("expert's channels", up.outputs // 2)
        y = self._buffers.rows("expert's answers", down.outputs)
        return [
            gather(pairs, e, x_TD, x),
            *matrix.linear(up, x, raw, self._buffers.room, integers=self._integers, bias=up_bias),
            *activations.activate(experts.gating, raw, h),
            *matrix.linear(down, h, y, self._buffers.room, integers=self._integers, bias=down_bias),
            add_weighed(pairs, e, y, sums_TD),
        ]

    def _share(
        self, parts: Sequence[Part[CpuMatrix]], phase: Phase, *, with_biases: bool
    ) -> torch.Tensor:
        """This rank's share of the parts' sum."""
        (first, *others) = sorted(parts, key=lambda part: part.out is None)
        if first.out is None:
            share_TD = first.values
        else:
            share_TD = self._buffers.rows("partial", first.out.matrix.outputs)
            self._out(phase, first, share_TD, with_biases, add=False)
        for part in others:
            self._out(phase, part, share_TD, with_biases, add=True)
        return share_TD

    def _out(
        self,
        phase: Phase,
        part: Part[CpuMatrix],
        share_TD: torch.Tensor,
        with_biases: bool,
        *,
        add: bool,
    ) -> None:
        if part.out is None:
            self._add(phase, rows.add(share_TD, part.values))
        else:
            linear = part.out if with_biases else Linear(part.out.matrix)
            self._linear(phase, linear, part.values, share_TD, add=add)

    def _add(self, phase: Phase, instructions: Iterable[Instruction]) -> None:
        self.steps += [(phase, instruction) for instruction in instructions]

    def _linear(
        self,
        phase: Phase,
        linear: Linear[CpuMatrix],
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        counted: Header = Header.ROWS,
        add: bool = False,
    ) -> None:
        instructions = matrix.linear(
            linear.matrix,
            x,
            y,
            self._buffers.room,
            integers=self._integers,
            bias=linear.bias,
            rows=counted,
            add=add,
        )
        self._add(phase, instructions)

    def _normed(self, phase: Phase, x_TD: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        if norm is None:
            return x_TD
        normed_TD = self._buffers.rows("normed", x_TD.shape[1])
        self._add(phase, norms.norm(norm, x_TD, normed_TD))
        return normed_TD

    def _all_reduce(self, x_TD: torch.Tensor) -> None:
        group = self._collective
        if group.world == 1:
            return
        if isinstance(group, SharedMemory):
            self._add("all_reduce", reduce.all_reduce(group, x_TD))
        else:
            self.steps.append(("all_reduce", _in_python(group, x_TD)))

    def _turn(self, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the step's positions, computed once for all layers."""
        found = self._turns.get(id(rotation))
        if found is None:
            pairs = rotation.inverse.numel()
            cos = self._buffers.rows(f"cos {len(self._turns)}", pairs)
            sin = self._buffers.rows(f"sin {len(self._turns)}", pairs)
            positions = torch.from_numpy(self._inputs.positions)
            self._add(
                "embed",
                rotary.angles(positions, rotation.inverse, cos, sin, factor=rotation.factor),
            )
            found = self._turns[id(rotation)] = cos, sin
        return found


def _in_python(group: Collective, x_TD: torch.Tensor) -> Callable[[int], None]:
    def all_reduce(rows: int) -> None:
        group.all_reduce(x_TD[:rows])

    return all_reduce
