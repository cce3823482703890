"""Executes step plans on one rank: slots in, tokens out. Knows nothing of ray or sockets."""

from __future__ import annotations

import numpy as np
import torch

from shards import kv_cache
from shards.batch import Batch, DecodeRows, PrefillRows
from shards.collectives.base import Collective
from shards.contract import PromptLogprobs, Sampled, SlotStart, SlotWork, StepPlan, StepResult
from shards.layout import Layout
from shards.models.decoder import Decoder
from shards.models.spec import ModelSpec
from shards.sampling import Sampler
from shards.timing import PhaseTimer

# Rows of prompt logits held at a time: the whole prompt's would be prompt x vocabulary floats.
_PROMPT_ROWS = 64


class Slots:
    """What a rank remembers of every running sequence: tokens, block table, wishes."""

    def __init__(self, slots: int, context: int, block_size: int) -> None:
        self.tokens = np.zeros((slots, context + 1), dtype=np.int32)
        self.tables = np.zeros((slots, -(-context // block_size)), dtype=np.int64)
        self.blocks = np.zeros(slots, dtype=np.int64)
        self.prompt_lengths = np.zeros(slots, dtype=np.int64)
        self.prompt_logprobs = np.full(slots, -1, dtype=np.int64)

    def start(self, start: SlotStart) -> np.ndarray:
        """Fill a slot; returns its tokens."""
        tokens = np.frombuffer(start.tokens, dtype="<i4")
        self.tokens[start.slot, : len(tokens)] = tokens
        self.blocks[start.slot] = 0
        self.prompt_lengths[start.slot] = start.prompt_length
        self.prompt_logprobs[start.slot] = start.sampling.prompt_logprobs
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
        decoder: Decoder,
        spec: ModelSpec,
        layout: Layout,
        collective: Collective,
        *,
        blocks: int,
        block_size: int,
        max_sequences: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rank = collective.rank
        self._decoder = decoder
        self._collective = collective
        self._device = device
        self._block_size = block_size
        self._vocabulary_widths = tuple(len(rows) for rows in layout.vocabulary)
        self._caches = kv_cache.allocate(
            spec, layout, rank, blocks=blocks, block_size=block_size, dtype=dtype, device=device
        )
        self._slots = Slots(max_sequences, context, block_size)
        self._sampler = Sampler(spec.vocabulary, max_sequences, device) if rank == 0 else None

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
        batch = self._batch(plan.work)
        hidden_TD = self._decoder(batch, self._caches, self._collective, timer)
        prompt_logprobs = self._prompt_logprobs(plan.work, hidden_TD, timer)
        sampled = self._sample(plan.work, hidden_TD, timer)
        return StepResult(plan.step, plan.epoch, sampled, prompt_logprobs, timer.seconds())

    def _copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        if not pairs:
            return
        sources_N, targets_N = self._tensor(np.array(pairs).T)
        for cache in self._caches:
            cache.copy(sources_N, targets_N)

    def _batch(self, work: tuple[SlotWork, ...]) -> Batch:
        slots = np.array([item.slot for item in work])
        counts = np.array([item.count for item in work])
        firsts = np.array([item.start for item in work])
        ends = np.cumsum(counts)
        slots_T = np.repeat(slots, counts)
        positions_T = np.arange(ends[-1]) + np.repeat(firsts - (ends - counts), counts)
        blocks_T = self._slots.tables[slots_T, positions_T // self._block_size]
        decoding = counts == 1
        decode = None
        if decoding.any():
            contexts_S = firsts[decoding] + 1
            width = -(-int(contexts_S.max()) // self._block_size)
            decode = DecodeRows(
                self._tensor((ends - 1)[decoding]),
                self._tensor(self._slots.tables[slots[decoding], :width]),
                self._tensor(contexts_S),
            )
        prefills = tuple(
            self._prefill_rows(item, int(end))
            for item, end in zip(work, ends, strict=True)
            if item.count > 1
        )
        return Batch(
            self._tensor(self._slots.tokens[slots_T, positions_T].astype(np.int64)),
            self._tensor(positions_T),
            self._tensor(blocks_T),
            self._tensor(positions_T % self._block_size),
            decode,
            prefills,
        )

    def _prefill_rows(self, work: SlotWork, stop: int) -> PrefillRows:
        context = work.start + work.count
        blocks = -(-context // self._block_size)
        table = self._tensor(self._slots.tables[work.slot, :blocks])
        return PrefillRows(stop - work.count, stop, table, context)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def _gather_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor | None:
        """float32 [S, vocabulary] on rank 0, None elsewhere."""
        return self._collective.gather(self._decoder.logits(hidden_SD), self._vocabulary_widths)

    def _prompt_logprobs(
        self, work: tuple[SlotWork, ...], hidden_TD: torch.Tensor, timer: PhaseTimer
    ) -> tuple[PromptLogprobs, ...]:
        """The row of position p tells the log probability of the prompt's token p + 1."""
        found, row = [], 0
        for item in work:
            top = int(self._slots.prompt_logprobs[item.slot])
            known = min(item.start + item.count, int(self._slots.prompt_lengths[item.slot]) - 1)
            for at in range(item.start, known if top >= 0 else 0, _PROMPT_ROWS):
                stop = min(at + _PROMPT_ROWS, known)
                rows = slice(row + at - item.start, row + stop - item.start)
                logits_TV = self._gather_logits(hidden_TD[rows])
                if logits_TV is not None and self._sampler is not None:
                    following = self._slots.tokens[item.slot, at + 1 : stop + 1].tolist()
                    tokens = self._sampler.prompt_logprobs(logits_TV, following, top)
                    found.append(PromptLogprobs(item.slot, at + 1, tokens))
            row += item.count
        timer.mark("output")
        return tuple(found)

    def _sample(
        self, work: tuple[SlotWork, ...], hidden_TD: torch.Tensor, timer: PhaseTimer
    ) -> tuple[Sampled, ...]:
        counts = np.array([item.count for item in work])
        chosen = np.array([item.sample for item in work])
        if not chosen.any():
            return ()
        rows_S = self._tensor((np.cumsum(counts) - 1)[chosen])
        items = [item for item in work if item.sample]
        slots = [item.slot for item in items]
        positions = [item.start + item.count for item in items]
        logits_SV = self._gather_logits(hidden_TD[rows_S])
        timer.mark("output")
        sampled: tuple[Sampled, ...] = ()
        if logits_SV is None or self._sampler is None:
            tokens_S = torch.empty(len(items), dtype=torch.int64, device=self._device)
        else:
            tokens, logprobs = self._sampler.sample(logits_SV, slots, positions)
            # A slot without a token ends; until then any will do.
            tokens_S = torch.tensor(tokens, dtype=torch.int64, device=self._device).clamp_(min=0)
            sampled = tuple(
                Sampled(
                    item.slot,
                    position,
                    token,
                    logprob,
                    logits_SV[i].cpu().numpy().tobytes() if item.logits else None,
                )
                for i, (item, position, token, logprob) in enumerate(
                    zip(items, positions, tokens, logprobs, strict=True)
                )
            )
        timer.mark("sample")
        tokens_S = self._collective.broadcast(tokens_S)
        self._slots.tokens[slots, positions] = tokens_S.cpu().numpy()
        timer.mark("all_reduce")
        return sampled
