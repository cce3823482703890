"""The messages between the driver and its ranks. A leaf: msgspec only, no torch, no ray.

Deltas, not state: a rank keeps, per slot, the token ids, the block table and the sampling
parameters; a `StepPlan` says what changes and what to compute. The tokens that a step computes are
never named: they are the slot's own tokens at `start .. start+count`, where a decode's input is the
token that the rank itself received in the step before. So plan n+1 can leave before result n is
back.

Every message travels as [tag, fields...] in MessagePack (`encode`, `decode`).
"""

from __future__ import annotations

import msgspec


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How rank 0 picks tokens for a slot. Defaults leave the distribution as it is.

    The random number of a token is a function of (`seed`, its position) alone.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and generated tokens (arXiv:1909.05858)
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    seed: int = 0  # 64 bits
    logit_bias: dict[int, float] = {}
    barred: tuple[int, ...] = ()  # tokens that may not be drawn...
    barred_before: int = 0  # ...while the sampled token's position is below this (min_tokens)
    logprobs: int = -1  # -1: none; N: the sampled token's and the N most probable ones'
    prompt_logprobs: int = -1  # the same for every prompt token but the first
    grammar: str = ""  # what the generated text is held to (`shards/grammar.py`); "" is nothing
    end_tokens: tuple[int, ...] = ()  # with a grammar: may be drawn where the text is complete


class SlotStart(msgspec.Struct, frozen=True, array_like=True):
    """A sequence takes a slot (new, or preempted and resumed). `tokens` is int32 little-endian:
    the prompt and whatever was already generated; `prompt_length` says where the latter begins."""

    slot: int
    tokens: bytes
    prompt_length: int
    sampling: Sampling


class SlotWork(msgspec.Struct, frozen=True, array_like=True):
    """Compute positions `start .. start+count-1` of a slot and write their keys and values.

    `blocks` are appended to the slot's block table. Where `sample`, the last position's logits give
    the token at position start+count. Where `logits`, the result carries that position's logits.
    """

    slot: int
    start: int
    count: int
    blocks: tuple[int, ...] = ()
    sample: bool = True
    logits: bool = False


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """One step of the whole group: first `end` frees slots, then blocks are copied (source,
    target; all are read before any is written) for sequences that part ways inside a block, then
    `start` and `work`."""

    step: int
    epoch: int
    work: tuple[SlotWork, ...]
    start: tuple[SlotStart, ...] = ()
    end: tuple[int, ...] = ()
    copy: tuple[tuple[int, int], ...] = ()


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one token: its own log probability (of the raw logits, before penalties and temperature),
    its rank (1 is the most probable), and the most probable alternatives, most probable first."""

    token: int
    logprob: float
    rank: int
    top_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


NO_TOKEN = -1
"""In place of a sampled token: none could be picked, since the logits hold NaN or infinity, or
every token is barred, or the grammar lets none follow. The other slots of the step are none the
worse for it."""


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """`position` is the sampled token's own; `token` may be `NO_TOKEN`, where `fault` says what
    became of the slot's grammar. `logits` is float32 little-endian [vocabulary]."""

    slot: int
    position: int
    token: int
    logprobs: Logprobs | None = None
    logits: bytes | None = None
    fault: str = ""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of the tokens at positions `start, start+1, ...` of a slot's prompt."""

    slot: int
    start: int
    tokens: tuple[Logprobs, ...]


class PhaseSeconds(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank spent a step. `all_reduce` includes the wait for slower ranks."""

    embed: float = 0.0
    attention: float = 0.0
    ffn: float = 0.0
    all_reduce: float = 0.0
    output: float = 0.0
    sample: float = 0.0
    total: float = 0.0


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """Rank 0's answer to a plan."""

    step: int
    epoch: int
    sampled: tuple[Sampled, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    seconds: PhaseSeconds = PhaseSeconds()


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """First message of a rank on its connection; `token` proves that it belongs to this group."""

    rank: int
    token: str
    host: str
    pid: int


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """Bytes of weights loaded so far."""

    rank: int
    done: int
    total: int


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag="loaded"):
    """A rank holds its weights. `kv_bytes` is what it can give to the KV cache."""

    rank: int
    weight_bytes: int
    kv_bytes: int
    seconds: float
    peak_rss: int


class Tokenizer(msgspec.Struct, frozen=True, array_like=True, tag="tokenizer"):
    """What the model's tokens spell, for rank 0, which holds texts to grammars. `end_tokens` are
    the model's own."""

    tokenizer_json: str
    end_tokens: tuple[int, ...]


class Join(msgspec.Struct, frozen=True, array_like=True, tag="join"):
    """Form the collective of an epoch and lay out the KV cache of `blocks` blocks.

    `rendezvous` is what the collective named in the rank's config needs: "host:port" of the
    driver's store for process groups; empty for shared memory, whose descriptor comes with this
    message over the unix socket.
    """

    epoch: int
    blocks: int
    rendezvous: str = ""


class Joined(msgspec.Struct, frozen=True, array_like=True, tag="joined"):
    rank: int
    epoch: int


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="leave"):
    """Drop the collective and the KV cache of an epoch, keep the weights, and wait for the next
    `Join`. A rank inside a step hears of it when the step ends, which the driver's abort sees to.
    """

    epoch: int


class Left(msgspec.Struct, frozen=True, array_like=True, tag="left"):
    rank: int
    epoch: int


class Query(msgspec.Struct, frozen=True, array_like=True, tag="query"):
    """Ask a rank, between steps, for its `RankStatus`."""


class RankStatus(msgspec.Struct, frozen=True, array_like=True, tag="status"):
    """`seconds` are sums since the epoch began. `expert_tokens`: for each layer with a mixture of
    experts, how many tokens were sent to each expert, on whatever rank it lies, since the weights
    were loaded."""

    rank: int
    steps: int
    seconds: PhaseSeconds
    rss: int
    expert_tokens: dict[int, tuple[int, ...]] = {}


class Failure(msgspec.Struct, frozen=True, array_like=True, tag="failure"):
    """A rank gives up: its epoch, where `stays`, for the fault is in the collective, and it can
    join another one; else its process. `suspect` is the rank it blames (one that did not arrive),
    or -1. `user_error`: the message alone is for the user; no trace is worth showing. `aborted`: it
    was told to, because of another rank."""

    rank: int
    message: str
    trace: str = ""
    suspect: int = -1
    user_error: bool = False
    aborted: bool = False
    stays: bool = False


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Leave `run()` in an orderly way."""


ToRank = StepPlan | Tokenizer | Join | Leave | Query | Stop
FromRank = StepResult | Hello | Progress | Loaded | Joined | Left | RankStatus | Failure

encode = msgspec.msgpack.Encoder().encode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
