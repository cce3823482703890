"""What a request may ask for, checked before it costs anything.

Every fault is collected, so that a client mends its request once. Field paths are those of
`headwise.v1`; each description quotes the value and says what to do.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence

from cluster.errors import InvalidRequest, Violation
from cluster.request import (
    BeamParams,
    Constraint,
    Language,
    ModelInfo,
    Request,
    SamplingParams,
    Stopping,
)
from cluster.text.codec import TextCodec

MAX_ID_BYTES = 128
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_STOP_TOKENS = 256
MAX_SEED = 2**64 - 1
MAX_BEAM_WIDTH = 16
MAX_LENGTH_PENALTY = 10.0
MAX_CONSTRAINT_BYTES = 64 << 10
MAX_CHOICES = 1024

_DEFAULTS = SamplingParams()


class BeyondContext(Violation):
    """A prompt that the model's context does not hold, or not with what is to follow it."""


def validate(
    request: Request,
    model: ModelInfo,
    *,
    has_tokenizer: bool,
    max_samples: int = 64,
    prompt_field: str = "prompt",
) -> None:
    """Raise `InvalidRequest` naming every fault, or return. What a constraint says is not looked
    at: that is for `cluster.constraints.ConstraintChecker`, which takes its time.

    `prompt_field` is where the client gave the prompt: "messages" for a conversation.
    """
    faults = _Faults()
    if len(_utf8(request.id)) > MAX_ID_BYTES:
        faults.add(
            "request_id",
            f"{len(_utf8(request.id))} bytes are more than {MAX_ID_BYTES}: use a shorter one",
        )
    _check_prompt(faults, request, model, prompt_field)
    _check_sampling(faults, request.sampling, model)
    _check_stopping(faults, request, model, has_tokenizer)
    faults.integer("n", request.n, 1, max_samples)
    _check_generated(faults, request, model)
    _check_output(faults, request, model)
    if request.beams is not None:
        _check_beams(faults, request, request.beams, model)
    if request.constraint is not None:
        _check_constraint(faults, request, request.constraint, model, has_tokenizer)
    faults.raise_any()


def max_prompt_bytes(codec: TextCodec, model: ModelInfo) -> int:
    """Bytes of UTF-8 beyond which no text fits into the context, whatever its tokens: a longer one
    can be refused before it is tokenized."""
    return (model.context - 1) * codec.longest_token_bytes


class _Faults:
    """Collects violations; its checks say whether the value passed."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def add(self, field: str, description: str, kind: type[Violation] = Violation) -> None:
        self._violations.append(kind(field, description))

    def raise_any(self) -> None:
        if self._violations:
            raise InvalidRequest(*self._violations)

    def integer(self, field: str, value: object, low: int, high: int) -> bool:
        """A whole number in [low, high]."""
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if whole and low <= value <= high:  # type: ignore[operator]
            return True
        self.add(field, f"{_quote(value)} is not a whole number from {low} to {high}: give one")
        return False

    def number(
        self, field: str, value: object, low: float, high: float, *, bounds: str = "[]"
    ) -> bool:
        """A finite number between low and high; `bounds` says which of them belong, as in "(]"."""
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            number = float(value)
            above = low <= number if bounds[0] == "[" else low < number
            below = number <= high if bounds[1] == "]" else number < high
            if math.isfinite(number) and above and below:
                return True
        interval = (
            f"above {low:g}" if math.isinf(high) else f"in {bounds[0]}{low:g}, {high:g}{bounds[1]}"
        )
        self.add(field, f"{_quote(value)} is not a finite number {interval}: give one")
        return False

    def token_ids(self, field: str, ids: Sequence[int], model: ModelInfo) -> bool:
        """Whole numbers below the vocabulary's size; names the first that is not."""
        position = _first_bad_id(ids, model.vocabulary)
        if position is None:
            return True
        self.add(
            field,
            f"token id {_quote(ids[position])} at index {position} is not in the vocabulary of "
            f"{model.vocabulary}: use whole numbers from 0 to {model.vocabulary - 1}",
        )
        return False


def _check_prompt(faults: _Faults, request: Request, model: ModelInfo, field: str) -> None:
    length = len(request.prompt)
    if length == 0:
        faults.add(field, "it has no tokens: give at least one")
        return
    faults.token_ids(field, request.prompt, model)
    if length > model.context - 1:
        faults.add(
            field,
            f"its {length} tokens leave no room in the context of {model.context}: shorten it to "
            f"at most {model.context - 1}",
            BeyondContext,
        )
    elif model.longest_prompt is not None and length > model.longest_prompt:
        faults.add(
            field,
            f"its {length} tokens are more than the {model.longest_prompt} of a step, and this "
            "model reads a prompt in one: shorten it, or serve with a larger max_step_tokens",
        )


def _check_sampling(faults: _Faults, sampling: SamplingParams, model: ModelInfo) -> None:
    faults.number("sampling.temperature", sampling.temperature, 0, MAX_TEMPERATURE)
    faults.integer("sampling.top_k", sampling.top_k, 0, 2**32 - 1)
    faults.number("sampling.top_p", sampling.top_p, 0, 1, bounds="(]")
    faults.number("sampling.min_p", sampling.min_p, 0, 1, bounds="[)")
    faults.number("sampling.repetition_penalty", sampling.repetition_penalty, 0.01, 100)
    for name in ("presence_penalty", "frequency_penalty"):
        faults.number(f"sampling.{name}", getattr(sampling, name), -MAX_PENALTY, MAX_PENALTY)
    if sampling.seed is not None:
        faults.integer("sampling.seed", sampling.seed, 0, MAX_SEED)

    bias = sampling.logit_bias
    if len(bias) > MAX_LOGIT_BIAS_ENTRIES:
        faults.add(
            "sampling.logit_bias",
            f"{len(bias)} entries are more than {MAX_LOGIT_BIAS_ENTRIES}: keep the ones that "
            "matter most",
        )
        return
    faults.token_ids("sampling.logit_bias", tuple(bias), model)
    for value in bias.values():
        if not faults.number("sampling.logit_bias", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS):
            break


def _check_stopping(
    faults: _Faults, request: Request, model: ModelInfo, has_tokenizer: bool
) -> None:
    stopping = request.stopping
    if stopping.max_tokens is None:
        faults.integer("stopping.min_tokens", stopping.min_tokens, 0, model.context)
    elif faults.integer("stopping.max_tokens", stopping.max_tokens, 1, 2**32 - 1):
        faults.integer("stopping.min_tokens", stopping.min_tokens, 0, stopping.max_tokens)
        length = len(request.prompt)
        if length < model.context < length + stopping.max_tokens:
            faults.add(
                "stopping.max_tokens",
                f"{stopping.max_tokens} after a prompt of {length} tokens go beyond the context "
                f"of {model.context}: ask for at most {model.context - length}",
                BeyondContext,
            )
    _check_conditions(faults, stopping, model, has_tokenizer)
    ends = {*stopping.token_ids, *(() if stopping.ignore_eos else model.eos_token_ids)}
    if stopping.min_tokens and len(ends) >= model.vocabulary:
        faults.add(
            "stopping.min_tokens",
            f"{stopping.min_tokens} while each of the {model.vocabulary} tokens would end the "
            "text: set it to 0, or stop at fewer tokens",
        )


def _check_conditions(
    faults: _Faults, stopping: Stopping, model: ModelInfo, has_tokenizer: bool
) -> None:
    field = "stopping.conditions"
    strings = stopping.strings
    if strings and not has_tokenizer:
        faults.add(
            field,
            f"the stop string {_quote(strings[0])} needs text and this model has no tokenizer: "
            "use stop token ids",
        )
    if len(strings) > MAX_STOP_STRINGS:
        faults.add(
            field,
            f"{len(strings)} stop strings are more than {MAX_STOP_STRINGS}: keep the ones that "
            "matter most",
        )
    if any(not string for string in strings):
        faults.add(field, "a stop string is empty: leave it out or give it at least one character")
    for string in strings:
        size = len(_utf8(string))
        if size > MAX_STOP_BYTES:
            faults.add(
                field,
                f"the stop string {_quote(string)} has {size} bytes, more than {MAX_STOP_BYTES}: "
                "shorten it",
            )
            break
    if len(stopping.token_ids) > MAX_STOP_TOKENS:
        faults.add(
            field,
            f"{len(stopping.token_ids)} stop token ids are more than {MAX_STOP_TOKENS}: keep the "
            "ones that matter most",
        )
    else:
        faults.token_ids(field, stopping.token_ids, model)


def _check_generated(faults: _Faults, request: Request, model: ModelInfo) -> None:
    count = len(request.generated)
    if count == 0:
        return
    if request.n != 1:
        faults.add(
            "generated",
            f"{count} tokens belong to one sample and n is {_quote(request.n)}: use n = 1",
        )
    faults.token_ids("generated", request.generated, model)
    limit = request.stopping.max_tokens
    if isinstance(limit, int) and 1 <= limit <= count:
        faults.add(
            "generated",
            f"its {count} tokens already reach max_tokens {limit}: there is nothing left to "
            "generate; raise max_tokens or treat the sample as finished",
        )
    length = len(request.prompt)
    if length < model.context <= length + count:
        faults.add(
            "generated",
            f"its {count} tokens after a prompt of {length} fill the context of {model.context}: "
            "treat the sample as finished",
        )


def _check_output(faults: _Faults, request: Request, model: ModelInfo) -> None:
    most = min(MAX_LOGPROBS, model.vocabulary)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(request.sampling, name)
        if value is not None:
            faults.integer(f"output.{name}", value, 0, most)
    if request.sampling.prompt_logprobs is not None and request.generated:
        faults.add(
            "output.prompt_logprobs",
            "a request that goes on after generated tokens does not score its prompt again: "
            "leave prompt_logprobs out, the first attempt delivered them",
        )


def _check_beams(faults: _Faults, request: Request, beams: BeamParams, model: ModelInfo) -> None:
    field = "beam_search.width"
    if faults.integer(field, beams.width, 2, MAX_BEAM_WIDTH):
        ends = len({*request.stopping.token_ids, *model.eos_token_ids})
        if beams.width + ends > model.vocabulary:
            faults.add(
                field,
                f"{beams.width} hypotheses cannot always go on with a vocabulary of "
                f"{model.vocabulary}, {ends} of which end them: use a smaller width",
            )
        if isinstance(request.n, int) and request.n > beams.width:
            faults.add("n", f"{request.n} of {beams.width} hypotheses: use a larger width")
    faults.number(
        "beam_search.length_penalty",
        beams.length_penalty,
        -MAX_LENGTH_PENALTY,
        MAX_LENGTH_PENALTY,
    )
    for setting in dataclasses.fields(SamplingParams):
        value = getattr(request.sampling, setting.name)
        if value != getattr(_DEFAULTS, setting.name):
            group = "output" if setting.name.endswith("logprobs") else "sampling"
            faults.add(
                f"{group}.{setting.name}",
                f"{_quote(value)} does not go with a beam search, which draws nothing and scores "
                "whole hypotheses: leave it out",
            )
    if request.stopping.strings:
        faults.add(
            "stopping.conditions",
            f"the stop string {_quote(request.stopping.strings[0])} does not go with a beam "
            "search, whose hypotheses are compared by their tokens: use stop token ids",
        )
    if request.generated:
        faults.add(
            "generated",
            f"{len(request.generated)} tokens do not tell how a beam search goes on: leave them "
            "out, it begins anew",
        )


def _check_constraint(
    faults: _Faults,
    request: Request,
    constraint: Constraint,
    model: ModelInfo,
    has_tokenizer: bool,
) -> None:
    if not has_tokenizer:
        faults.add("constraint", "it needs text and this model has no tokenizer: leave it out")
    _check_source(faults, constraint)
    stopping = request.stopping
    if stopping.ignore_eos:
        faults.add(
            "stopping.ignore_eos",
            "true does not go with a constraint, whose texts end where they are complete: leave "
            "it out",
        )
    elif not (stopping.token_ids or model.eos_token_ids):
        faults.add(
            "constraint",
            "this model has no end token with which a complete text could end: name one among the "
            "stopping.conditions",
        )
    if stopping.min_tokens:
        faults.add(
            "stopping.min_tokens",
            f"{_quote(stopping.min_tokens)} does not go with a constraint, whose texts end where "
            "they are complete: leave it out, or ask for longer texts in the constraint",
        )
    if request.beams is not None:
        faults.add("constraint", "it does not go with a beam search: leave one of them out")


def _check_source(faults: _Faults, constraint: Constraint) -> None:
    field, texts = f"constraint.{constraint.language}", constraint.source
    choices = constraint.language is Language.CHOICES
    if choices and not 1 <= len(texts) <= MAX_CHOICES:
        faults.add(field, f"{len(texts)} choices: give 1 to {MAX_CHOICES}")
    for index, text in enumerate(texts):
        if not text:
            which = f"choice {index} is" if choices else "it is"
            faults.add(field, f"{which} empty: give at least one character, or leave it out")
            break
        try:
            text.encode()
        except UnicodeEncodeError as error:
            faults.add(
                field,
                f"it holds the lone surrogate {text[error.start]!r}, which no UTF-8 text can: "
                "remove it or decode the text correctly",
            )
            break
    size = sum(len(_utf8(text)) for text in texts)
    if size > MAX_CONSTRAINT_BYTES:
        faults.add(field, f"{size} bytes are more than {MAX_CONSTRAINT_BYTES}: shorten it")


def _first_bad_id(ids: Sequence[int], vocabulary: int) -> int | None:
    """Built-ins over the whole sequence: a prompt of 100,000 tokens takes milliseconds."""
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocabulary):
        return None
    return next(
        (i for i, token in enumerate(ids) if type(token) is not int or not 0 <= token < vocabulary),
        None,
    )


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _quote(value: object) -> str:
    """The value as a reader knows it, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 64 else f"{shown[:60]}..."
