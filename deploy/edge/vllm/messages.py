"""Messages of `vllm.grpc.engine` become an `Intake`, or an `InvalidRequest` that names every fault.

Numbers that are not `optional` in the proto cannot be told from 0: where 0 is no value that vLLM
takes (`top_p`, `repetition_penalty`, `n`), it stands for the default, as in vLLM's own service.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sized

from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from cluster.errors import InvalidRequest, Violation
from cluster.request import Constraint, Language, Request, SamplingParams, Stopping
from cluster.validation import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)
from deploy.codec import shortest
from deploy.edge.intake import Intake, Output, Prompt, take
from deploy.edge.models import Served

_PARAMS = "sampling_params"
_WHOLE_CONTEXT = -1
_UNSEEDED = -1
# What no grammar in Lark has outside of its texts.
_EBNF = "::="
# The translation takes time with the square of it: here a tenth of a second.
_MOST_EBNF = 8 << 10
_LANGUAGES = {
    "json_schema": Language.JSON_SCHEMA,
    "regex": Language.REGEX,
    "grammar": Language.LARK,
}
# Fields of `headwise.v1` under other names here; groups are all `sampling_params`.
_NAMES = {
    "constraint": f"{_PARAMS}.constraint",
    "constraint.lark": f"{_PARAMS}.grammar",
    "constraint.choices": f"{_PARAMS}.choice",
    "n": f"{_PARAMS}.n",
}
_GROUPS = ("sampling.", "stopping.", "output.", "constraint.")
_FOREIGN = {
    "mm_inputs": "this model takes text alone",
    "media_refs": "this model takes text alone",
    "kv_transfer_params": "KV caches do not travel between workers here",
    "kv_transfer_params_json": "KV caches do not travel between workers here",
}


async def take_generate(
    message: pb.GenerateRequest, served: Served, deadline: float | None
) -> Intake:
    """`deadline` is `time.monotonic()` seconds. Raises `InvalidRequest`, or `Overloaded` by the
    tokenizer."""
    params = message.sampling_params
    _check_extent(message, served.generator.model.context)
    with own_names(message):
        prompt, misfit = await _prompt(message, served)
        constraint, misread = await _constraint(params)
        faults = (*_foreign(message), *misfit, *misread)
        request = Request(
            id=message.request_id,
            prompt=(),
            sampling=_sampling(params),
            stopping=_stopping(params),
            n=params.n or 1,
            deadline=deadline,
            constraint=constraint,
        )
        output = Output(with_text=False, skip_special_tokens=params.skip_special_tokens)
        return await take(prompt, request, output, served, faults)


@contextlib.contextmanager
def own_names(message: pb.GenerateRequest) -> Iterator[None]:
    """`InvalidRequest`s leave with the fields' names in this API."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(
            *(Violation(_own_name(v.field, message), v.description) for v in error.violations)
        ) from error


def _own_name(field: str, message: pb.GenerateRequest) -> str:
    if field == "stopping.conditions":
        return f"{_PARAMS}.stop" if message.sampling_params.stop else f"{_PARAMS}.stop_token_ids"
    if field == "prompt":
        return "text" if message.WhichOneof("input") == "text" else "tokenized.input_ids"
    for group in _GROUPS:
        if field not in _NAMES and field.startswith(group):
            return f"{_PARAMS}.{field.removeprefix(group)}"
    return _NAMES.get(field, field)


def _check_extent(message: pb.GenerateRequest, context: int) -> None:
    """Before each entry costs Python any work."""
    params = message.sampling_params
    truncates = params.HasField("truncate_prompt_tokens")
    sizes: tuple[tuple[str, Sized, int | None], ...] = (
        ("tokenized.input_ids", message.tokenized.input_ids, None if truncates else context),
        (f"{_PARAMS}.stop", params.stop, MAX_STOP_STRINGS),
        (f"{_PARAMS}.stop_token_ids", params.stop_token_ids, MAX_STOP_TOKENS),
        (f"{_PARAMS}.logit_bias", params.logit_bias, MAX_LOGIT_BIAS_ENTRIES),
        (f"{_PARAMS}.choice", params.choice.choices, MAX_CHOICES),
    )
    faults = [
        Violation(field, f"{len(value)} entries are more than {most}: send fewer")
        for field, value, most in sizes
        if most is not None and len(value) > most
    ]
    if faults:
        raise InvalidRequest(*faults)


async def _prompt(
    message: pb.GenerateRequest, served: Served
) -> tuple[Prompt, tuple[Violation, ...]]:
    kind = message.WhichOneof("input")
    if kind is None:
        return Prompt(None), (Violation("input", "not set: set tokenized or text"),)
    params = message.sampling_params
    if not params.HasField("truncate_prompt_tokens"):
        content = message.text if kind == "text" else tuple(message.tokenized.input_ids)
        return Prompt(content), ()
    most = params.truncate_prompt_tokens
    if most == _WHOLE_CONTEXT:
        most = served.generator.model.context - (params.max_tokens or 1)
    if most < 1:
        fault = Violation(
            f"{_PARAMS}.truncate_prompt_tokens",
            f"{params.truncate_prompt_tokens} leaves nothing of the prompt: keep at least one "
            "token, or -1 for what the context has room for beside max_tokens",
        )
        return Prompt(None), (fault,)
    if kind == "text":
        ids = await served.texts.encode(message.text, add_special_tokens=True, field="prompt")
        return Prompt(ids[-most:]), ()
    # The end of a prompt is what its continuation depends on most; vLLM keeps it too.
    return Prompt(tuple(message.tokenized.input_ids[-most:])), ()


def _foreign(message: pb.GenerateRequest) -> Iterator[Violation]:
    """What only vLLM has."""
    for field, reason in _FOREIGN.items():
        if message.HasField(field):
            yield Violation(field, f"{reason}: leave it out")
    if message.extra_mm_inputs:
        yield Violation("extra_mm_inputs", "this model takes text alone: leave it out")
    if message.data_parallel_rank:
        yield Violation(
            "data_parallel_rank",
            f"{message.data_parallel_rank}: this worker is one rank, 0; leave it out",
        )


def _sampling(params: pb.SamplingParams) -> SamplingParams:
    seed = params.seed if params.HasField("seed") and params.seed != _UNSEEDED else None
    return SamplingParams(
        temperature=shortest(params.temperature) if params.HasField("temperature") else 1.0,
        top_k=params.top_k,
        top_p=shortest(params.top_p or 1.0),
        min_p=shortest(params.min_p),
        repetition_penalty=shortest(params.repetition_penalty or 1.0),
        presence_penalty=shortest(params.presence_penalty),
        frequency_penalty=shortest(params.frequency_penalty),
        # Signed ones in two's complement: headwise's are not.
        seed=None if seed is None else seed & MAX_SEED,
        logit_bias={token: shortest(value) for token, value in params.logit_bias.items()},
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
    )


def _stopping(params: pb.SamplingParams) -> Stopping:
    return Stopping(
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        min_tokens=params.min_tokens,
        strings=tuple(params.stop),
        token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        # vLLM's token ids include what ended them; the gateway, which makes the text, cuts it off.
        include_stop=True,
    )


async def _constraint(params: pb.SamplingParams) -> tuple[Constraint | None, tuple[Violation, ...]]:
    kind = params.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not params.json_object):
        return None, ()
    if kind == "structural_tag":
        return None, (
            Violation(
                f"{_PARAMS}.structural_tag",
                "this server has no structural tags: send json_schema, regex, grammar or choice; "
                "a gateway sends them for some tool call parsers, so choose another one",
            ),
        )
    if kind == "json_object":
        return Constraint(Language.JSON_SCHEMA, ('{"type": "object"}',)), ()
    if kind == "choice":
        return Constraint(Language.CHOICES, tuple(params.choice.choices)), ()
    source: str = getattr(params, kind)
    if kind == "grammar" and _EBNF in source:
        return await _from_ebnf(source)
    return Constraint(_LANGUAGES[kind], (source,)), ()


async def _from_ebnf(source: str) -> tuple[Constraint | None, tuple[Violation, ...]]:
    """EBNF as XGrammar and llama.cpp write it."""
    field = f"{_PARAMS}.grammar"
    if len(source) > _MOST_EBNF:
        fault = f"{len(source)} characters of EBNF are more than {_MOST_EBNF}: shorten it"
        return None, (Violation(field, f"{fault}, or write it in Lark"),)
    try:
        return Constraint(Language.LARK, (await asyncio.to_thread(gbnf_to_lark, source),)), ()
    except (GbnfToLarkError, RecursionError) as error:
        cause = " ".join(str(error).split())
        return None, (Violation(field, f"it is not EBNF ({cause}): mend it, or write it in Lark"),)
