"""Executes step plans on one rank: slots in, tokens out. Knows nothing of ray or sockets."""

from __future__ import annotations

import numpy as np
import torch

from shards.batch import Batch
from shards.collectives.base import Collective
from shards.contract import (
    NO_TOKEN,
    PromptLogprobs,
    Sampled,
    SlotStart,
    SlotWork,
    StepPlan,
    StepResult,
)
from shards.errors import NotEnoughMemory
from shards.grammar import GrammarTokenizer
from shards.kernels.base import KernelSet, Limits, M
from shards.kv_cache import LayerCache
from shards.layout import Layout
from shards.models.decoder import Decoder
from shards.models.spec import LatentAttention, ModelSpec
from shards.sampling import Sampler, shortlist
from shards.timing import PhaseTimer

# Rows of prompt logits held at a time: the whole prompt's would be prompt x vocabulary floats.
_PROMPT_ROWS = 64


class Slots:
    """What a rank remembers of every running sequence: tokens, block table, wishes."""

    def __init__(self, slots: int, context: int, block_size: int) -> None:
        self.tokens = np.zeros((slots, context + 1), dtype=np.int64)
        self.tables = np.zeros((slots, -(-context // block_size)), dtype=np.int64)
        self.blocks = np.zeros(slots, dtype=np.int64)
        self.prompt_lengths = np.zeros(slots, dtype=np.int64)
        self.prompt_logprobs = np.full(slots, -1, dtype=np.int64)
        self.shortlist = np.zeros(slots, dtype=np.int64)

    def start(self, start: SlotStart) -> np.ndarray:
        """Fill a slot; returns its tokens."""
        tokens = np.frombuffer(start.tokens, dtype="<i4")
        self.tokens[start.slot, : len(tokens)] = tokens
        self.blocks[start.slot] = 0
        self.prompt_lengths[start.slot] = start.prompt_length
        self.prompt_logprobs[start.slot] = start.sampling.prompt_logprobs
        self.shortlist[start.slot] = shortlist.width(start.sampling)
        return tokens

    def extend_table(self, work: SlotWork) -> None:
        have = self.blocks[work.slot]
        self.tables[work.slot, have : have + len(work.blocks)] = work.blocks
        self.blocks[work.slot] += len(work.blocks)


class Runner:
    """One rank's model, cache and slots for one epoch.

    Every rank executes the same plans in the same order; the collectives inside keep step. Rank 0
    alone samples and answers; the others learn the tokens through a broadcast.
    """

    def __init__(
        self,
        decoder: Decoder[M],
        kernels: KernelSet[M],
        spec: ModelSpec,
        layout: Layout,
        collective: Collective,
        *,
        blocks: int,
        block_size: int,
        max_sequences: int,
        max_step_tokens: int,
        context: int,
        device: torch.device,
        tokenizer: GrammarTokenizer | None = None,
    ) -> None:
        """`tokenizer`: what rank 0 holds texts to grammars with."""
        rank = collective.rank
        self._collective = collective
        self._device = device
        self._block_size = block_size
        self._vocabulary = layout.vocabulary
        self._caches = _allocate(kernels, spec, layout, rank, blocks, block_size)
        self._slots = Slots(max_sequences, context, block_size)
        self._sampler = (
            Sampler(spec.vocabulary, max_sequences, device, tokenizer) if rank == 0 else None
        )
        # A step computes no more than its budget, and at least one row of each running sequence.
        limits = Limits(
            rows=max(max_step_tokens, max_sequences),
            sequences=max_sequences,
            blocks=self._slots.tables.shape[1],
            sampled=max(max_sequences, _PROMPT_ROWS),
        )
        self._executor = kernels.executor(decoder, self._caches, collective, limits)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Apply a plan's changes and compute its work. Off rank 0 the result holds timings only."""
        timer = PhaseTimer()
        for slot in plan.end:
            if self._sampler is not None:
                self._sampler.end(slot)
        self._copy(plan.copy)
        for start in plan.start:
            tokens = self._slots.start(start)
            if self._sampler is not None:
                self._sampler.start(start.slot, start.sampling, tokens, start.prompt_length)
        for work in plan.work:
            self._slots.extend_table(work)
        self._executor.forward(self._batch(plan.work), timer)
        prompt_logprobs = self._prompt_logprobs(plan.work, timer)
        sampled = self._sample(plan.work, timer)
        return StepResult(plan.step, plan.epoch, sampled, prompt_logprobs, timer.seconds())

    def _copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        if not pairs:
            return
        sources_N, targets_N = torch.from_numpy(np.array(pairs).T).to(self._device)
        for cache in self._caches:
            cache.copy(sources_N, targets_N)

    def _batch(self, work: tuple[SlotWork, ...]) -> Batch:
        numbers = np.array([(item.slot, item.start, item.count) for item in work], np.int64)
        slots, firsts, counts = numbers.T
        ends = np.cumsum(counts)
        slots_T = np.repeat(slots, counts)
        positions_T = np.arange(ends[-1]) + np.repeat(firsts - (ends - counts), counts)
        return Batch(
            self._slots.tokens[slots_T, positions_T],
            positions_T,
            self._slots.tables[slots_T, positions_T // self._block_size],
            positions_T % self._block_size,
            np.stack((ends - counts, counts, firsts + counts, slots), axis=1),
            self._slots.tables,
            self._slots.prompt_lengths[slots],
        )

    def _gather_logits(self, logits_SV: torch.Tensor) -> torch.Tensor | None:
        """This rank's slice of the vocabulary -> float32 [S, vocabulary] on rank 0, None
        elsewhere."""
        return self._collective.gather(logits_SV, [len(rows) for rows in self._vocabulary])

    def _prompt_logprobs(
        self, work: tuple[SlotWork, ...], timer: PhaseTimer
    ) -> tuple[PromptLogprobs, ...]:
        """The row of position p tells the log probability of the prompt's token p + 1."""
        found, row = [], 0
        for item in work:
            top = int(self._slots.prompt_logprobs[item.slot])
            known = min(item.start + item.count, int(self._slots.prompt_lengths[item.slot]) - 1)
            for at in range(item.start, known if top >= 0 else 0, _PROMPT_ROWS):
                stop = min(at + _PROMPT_ROWS, known)
                rows = np.arange(row + at - item.start, row + stop - item.start)
                logits_TV = self._gather_logits(self._executor.logits(rows, timer))
                if logits_TV is not None and self._sampler is not None:
                    following = self._slots.tokens[item.slot, at + 1 : stop + 1].tolist()
                    tokens = self._sampler.prompt_logprobs(logits_TV, following, top)
                    found.append(PromptLogprobs(item.slot, at + 1, tokens))
            row += item.count
        timer.mark("output")
        return tuple(found)

    def _sample(self, work: tuple[SlotWork, ...], timer: PhaseTimer) -> tuple[Sampled, ...]:
        items = [item for item in work if item.sample]
        if not items:
            return ()
        rows_S = np.cumsum([item.count for item in work])[[item.sample for item in work]] - 1
        slots = np.array([item.slot for item in items])
        positions = np.array([item.start + item.count for item in items])
        logits_SV = self._executor.logits(rows_S, timer)
        widths = self._slots.shortlist[slots]
        whole_S = (widths == 0) | np.array([item.logits for item in items])
        if whole_S.any() or widths.max() > 1:
            sampled, tokens_S = self._sample_on_rank_0(logits_SV, items, positions, whole_S, timer)
            tokens_S = self._collective.broadcast(tokens_S)
        else:
            sampled, tokens_S = self._sample_greedily(logits_SV, slots, positions, timer)
        self._slots.tokens[slots, positions] = tokens_S.cpu().numpy()
        timer.mark("sample")
        return sampled

    def _sample_greedily(
        self, logits_SV: torch.Tensor, slots: np.ndarray, positions: np.ndarray, timer: PhaseTimer
    ) -> tuple[tuple[Sampled, ...], torch.Tensor]:
        """Every rank sees each one's best token, and so knows the pick without being told."""
        own = shortlist.shortlist(logits_SV, self._vocabulary[self._collective.rank].start, 1)
        timer.mark("output")
        widths = [2] * self._collective.world
        best_SC, tokens_SC = shortlist.join(self._collective.all_gather(own, widths), widths)
        timer.mark("all_reduce")
        columns_S1 = best_SC.argmax(-1, keepdim=True)
        tokens_S = tokens_SC.gather(1, columns_S1)[:, 0]
        if self._sampler is None:
            return (), tokens_S
        usable_S = best_SC.gather(1, columns_S1)[:, 0].isfinite()
        told = torch.where(usable_S, tokens_S, NO_TOKEN).tolist()
        return tuple(map(Sampled, slots.tolist(), positions.tolist(), told)), tokens_S

    def _sample_on_rank_0(
        self,
        logits_SV: torch.Tensor,
        items: list[SlotWork],
        positions: np.ndarray,
        whole_S: np.ndarray,
        timer: PhaseTimer,
    ) -> tuple[tuple[Sampled, ...], torch.Tensor]:
        """Rank 0 picks, from whole logits where a slot needs them and from short lists for the
        others, which are none the slower for their company."""
        sampled: dict[int, Sampled] = {}
        for rows, sample in (
            (np.flatnonzero(whole_S), self._sample_whole),
            (np.flatnonzero(~whole_S), self._sample_shortlists),
        ):
            if len(rows):
                part_PV = logits_SV
                if len(rows) < len(items):
                    part_PV = logits_SV[torch.from_numpy(rows).to(self._device)]
                part = [items[row] for row in rows]
                sampled |= zip(
                    rows.tolist(), sample(part_PV, part, positions[rows], timer), strict=False
                )
        if self._sampler is None:
            return (), torch.empty(len(items), dtype=torch.int64, device=self._device)
        ordered = tuple(sampled[row] for row in range(len(items)))
        # A slot without a token ends; until then any will do.
        tokens_S = torch.tensor([one.token for one in ordered], device=self._device).clamp_(min=0)
        return ordered, tokens_S

    def _sample_shortlists(
        self,
        logits_SV: torch.Tensor,
        items: list[SlotWork],
        positions: np.ndarray,
        timer: PhaseTimer,
    ) -> tuple[Sampled, ...]:
        """Where each rank's likeliest tokens are enough to choose from; () off rank 0."""
        slots = np.array([item.slot for item in items])
        count = int(self._slots.shortlist[slots].max())
        own = shortlist.shortlist(logits_SV, self._vocabulary[self._collective.rank].start, count)
        widths = tuple(2 * min(count, len(rows)) for rows in self._vocabulary)
        lists = self._collective.gather(own, widths)
        timer.mark("output")
        if lists is None or self._sampler is None:
            return ()
        logits_SC, tokens_SC = shortlist.join(lists, widths)
        columns, _ = self._sampler.sample(logits_SC, slots, positions)
        columns_S = torch.tensor(columns, device=self._device)
        tokens_S = tokens_SC.gather(1, columns_S.clamp(min=0)[:, None])[:, 0]
        told = torch.where(columns_S < 0, NO_TOKEN, tokens_S).tolist()
        return tuple(map(Sampled, slots.tolist(), positions.tolist(), told))

    def _sample_whole(
        self,
        logits_SV: torch.Tensor,
        items: list[SlotWork],
        positions: np.ndarray,
        timer: PhaseTimer,
    ) -> tuple[Sampled, ...]:
        """Where nothing less than all logits will do; () off rank 0."""
        gathered_SV = self._gather_logits(logits_SV)
        timer.mark("output")
        if gathered_SV is None or self._sampler is None:
            return ()
        slots = [item.slot for item in items]
        tokens, logprobs = self._sampler.sample(gathered_SV, slots, positions)
        return tuple(
            Sampled(
                item.slot,
                position,
                token,
                logprob,
                gathered_SV[i].cpu().numpy().tobytes() if item.logits else None,
                self._sampler.fault(item.slot) if token == NO_TOKEN else "",
            )
            for i, (item, position, token, logprob) in enumerate(
                zip(items, positions.tolist(), tokens, logprobs, strict=True)
            )
        )


def _allocate(
    kernels: KernelSet[M],
    spec: ModelSpec,
    layout: Layout,
    rank: int,
    blocks: int,
    block_size: int,
) -> tuple[LayerCache, ...]:
    """A pool for every layer; raises `NotEnoughMemory` if the device refuses."""
    try:
        return tuple(
            kernels.allocate(
                blocks,
                len(split.kv_heads[rank]),
                block_size,
                layer.attention.head_dim,
                layer.attention.latent if isinstance(layer.attention, LatentAttention) else None,
            )
            for layer, split in zip(spec.layers, layout.layers, strict=True)
        )
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        raise NotEnoughMemory(
            f"rank {rank} cannot hold a KV cache of {blocks} blocks of {block_size} tokens "
            f"({error}); give a smaller --kv-memory"
        ) from error
