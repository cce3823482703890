"""Constraints on their way in: what is refused, and with which words; bad ones cost no process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cluster import constraints
from cluster.constraints import ConstraintChecker
from cluster.errors import InvalidRequest, Unavailable
from cluster.request import Constraint, Language, Request
from cluster.text import TextCodec
from tests.unit.fakes import FakeCodec
from tests.unit.tiny_tokenizers import byte_level, metaspace


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(byte_level())


@pytest.fixture(scope="module")
def checker(codec: TextCodec) -> Iterator[ConstraintChecker]:
    checker = ConstraintChecker(codec, codec.eos_token_ids)
    yield checker
    checker.close()


def asking(language: Language, *source: str, generated: tuple[int, ...] = ()) -> Request:
    return Request("r", (1,), constraint=Constraint(language, source), generated=generated)


def for_json(schema: Any) -> Request:
    return asking(Language.JSON_SCHEMA, json.dumps(schema))


def refusal(checker: ConstraintChecker, request: Request) -> tuple[str, str]:
    with pytest.raises(InvalidRequest) as refused:
        checker.check(request)
    [violation] = refused.value.violations
    return violation.field, violation.description


UNION = {
    "oneOf": [
        {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]}
        for kind in ("a", "b")
    ],
    "discriminator": {"propertyName": "kind"},
}


@pytest.mark.parametrize(
    "request_",
    [
        for_json({}),
        for_json(True),
        for_json({"title": "t", "description": "d", "default": 1, "deprecated": True}),
        for_json({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#"}}}}),
        for_json(UNION),
        for_json({"type": "string", "format": "uuid"}),
        asking(Language.REGEX, r"a/b\.(c|d)*?[^x]\d"),
        asking(Language.LARK, 'start: WORD ("," WORD)*\nWORD: /[a-z]+/'),
        asking(Language.CHOICES, "a", 'b"', "\n\x00", "🙂"),
    ],
)
def test_what_can_be_held_to(checker: ConstraintChecker, request_: Request) -> None:
    checker.check(request_)
    checker.check(request_)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (asking(Language.JSON_SCHEMA, "{"), "not JSON"),
        (asking(Language.JSON_SCHEMA, "[" * 60_000), "not JSON"),
        (for_json([1]), "a schema is an object"),
        (for_json(False), "Unsatisfiable"),
        (for_json({"type": "strng"}), "strng"),
        (for_json({"enum": []}), "Unsatisfiable"),
        (for_json({"type": "string", "minLength": 2, "maxLength": 1}), "minLength"),
        (for_json({"$ref": "#/$defs/missing"}), "missing"),
        (for_json({"$ref": "http://else.where/schema"}), "else.where"),
        (for_json({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "no text"),
        # What is not enforced is refused, also where the schema asks for leniency.
        (for_json({"uniqueItems": True}), "uniqueItems"),
        (for_json({"uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (for_json({"not": {}}), "not"),
        (for_json({"if": {}, "then": {}}), "if"),
        (for_json({"oneOf": [{}, {}], "x-guidance": {"coerce_one_of": True}}), "oneOf"),
        (for_json({"type": "string", "format": "unheard-of"}), "unheard-of"),
        (asking(Language.REGEX, "[a"), "unclosed character class"),
        (asking(Language.REGEX, "a(?=b)"), "look-around"),
        (asking(Language.REGEX, r"(a)\1"), "backreference"),
        (asking(Language.LARK, "start: other"), "unknown name"),
        (asking(Language.LARK, '{"grammars": [{"json_schema": {}}]}'), "expecting rule"),
    ],
)
def test_what_cannot(checker: ConstraintChecker, request_: Request, reason: str) -> None:
    field, description = refusal(checker, request_)
    assert request_.constraint is not None
    assert field == f"constraint.{request_.constraint.language}"
    assert reason in description


DEEP = 'start: r0\n{}\nr5000: "a"'.format("\n".join(f"r{i}: r{i + 1}" for i in range(5000)))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (for_json({"type": "integer", "multipleOf": 1_000_003}), "more than 0.25 s"),
        (asking(Language.LARK, DEEP), "nested too deeply"),
    ],
)
def test_what_would_stall_or_crash_who_compiles_it(
    checker: ConstraintChecker, request_: Request, reason: str
) -> None:
    assert reason in refusal(checker, request_)[1]
    checker.check(asking(Language.REGEX, "still here"))


def test_generated_tokens_have_to_fit(checker: ConstraintChecker, codec: TextCodec) -> None:
    known = tuple(codec.encode("aab"))
    checker.check(asking(Language.REGEX, "a+b?c?", generated=known))
    checker.check(asking(Language.REGEX, "a+b", generated=known))
    field, description = refusal(checker, asking(Language.REGEX, "a+", generated=known))
    assert field == "generated"
    assert f"token {known[2]}" in description
    assert "index 2" in description


def test_a_sandbox_that_is_gone_is_started_again(codec: TextCodec) -> None:
    checker = ConstraintChecker(codec, codec.eos_token_ids)
    try:
        checker.check(asking(Language.REGEX, "one"))
        assert checker._sandbox is not None
        os.kill(checker._sandbox.pid, signal.SIGKILL)
        checker._sandbox.wait()
        checker.check(asking(Language.REGEX, "two"))
    finally:
        checker.close()
    checker.close()


def test_a_process_that_cannot_be_had(codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = ConstraintChecker(codec, codec.eos_token_ids)
    request = asking(Language.REGEX, "one")
    try:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", "/bin/false")
            for _ in range(2):
                with pytest.raises(Unavailable, match="no process can be had"):
                    checker.check(request)
        checker.check(request)
    finally:
        checker.close()


def test_a_process_that_says_nothing(codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = ConstraintChecker(codec, codec.eos_token_ids)
    try:
        checker.check(asking(Language.REGEX, "one"))
        assert checker._sandbox is not None
        stopped = checker._sandbox
        os.kill(stopped.pid, signal.SIGSTOP)
        monkeypatch.setattr(constraints, "_PATIENCE_MS", 100)
        # Its successor may need longer than that to start.
        with contextlib.suppress(Unavailable):
            checker.check(asking(Language.REGEX, "two"))
        assert stopped.poll() == -signal.SIGKILL
    finally:
        checker.close()


def test_a_tokenizer_that_cannot_be_read() -> None:
    checker = ConstraintChecker(FakeCodec(), ())  # type: ignore[arg-type]
    try:
        for _ in range(2):
            assert "cannot be read" in refusal(checker, asking(Language.REGEX, "a"))[1]
    finally:
        checker.close()


def test_a_tokenizer_whose_tokens_are_no_bytes() -> None:
    codec = TextCodec(metaspace())
    checker = ConstraintChecker(codec, codec.eos_token_ids)
    try:
        for _ in range(2):
            assert "Metaspace" in refusal(checker, asking(Language.REGEX, "a"))[1]
    finally:
        checker.close()


def test_what_was_refused_is_not_tried_again(codec: TextCodec) -> None:
    checker = ConstraintChecker(codec, codec.eos_token_ids)
    bad = asking(Language.REGEX, "[a")
    try:
        before = refusal(checker, bad)
        assert checker._sandbox is not None
        os.kill(checker._sandbox.pid, signal.SIGKILL)
        gone = checker._sandbox
        assert refusal(checker, bad) == before
        assert checker._sandbox is gone  # else a new one would have been asked
    finally:
        checker.close()


def test_closing_ends_what_is_being_tried(codec: TextCodec) -> None:
    checker = ConstraintChecker(codec, codec.eos_token_ids)
    checker.check(asking(Language.REGEX, "one"))
    assert checker._sandbox is not None
    os.kill(checker._sandbox.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        trial = threads.submit(checker.check, asking(Language.REGEX, "two"))
        while not checker._lock.locked():
            time.sleep(0.001)
        checker.close()
        with pytest.raises(Unavailable, match="shutting down"):
            trial.result(timeout=20)
    with pytest.raises(Unavailable, match="shutting down"):
        checker.check(asking(Language.REGEX, "three"))
    assert checker._sandbox is None
