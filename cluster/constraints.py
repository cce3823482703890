"""Constraints of requests: turned into grammars, and tried out before anything is admitted."""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection

import msgspec
from llguidance import LLMatcher

from cluster.errors import InvalidRequest, Unavailable, Violation
from cluster.request import Constraint, Language, Request
from cluster.text import TextCodec
from shards.grammar_sandbox import Tokenizer, Trial, Verdict

# Between the parts of a JSON text: nothing, a space, or a new line and its indentation. Small
# models left to themselves can fill a context with white space.
_JSON_WHITESPACE = r"[ ]|\n[ \t]{0,20}"
# Grammars that are not tried again.
_VERDICTS_KEPT = 256
# Of a process that says nothing: it is stopped, or the machine has no time for it.
_PATIENCE_MS = 30_000


def field_of(constraint: Constraint) -> str:
    """Where the client wrote it."""
    return f"constraint.{constraint.language}"


def to_grammar(constraint: Constraint) -> str:
    """A constraint in llguidance's notation. Raises `InvalidRequest` where a schema is no JSON."""
    match constraint.language:
        case Language.JSON_SCHEMA:
            return _from_schema(constraint)
        case Language.REGEX:
            return str(LLMatcher.grammar_from_regex(constraint.source[0]))
        case Language.LARK:
            return _from_lark(constraint.source[0])
        case Language.CHOICES:
            texts = (json.dumps(text, ensure_ascii=False) for text in constraint.source)
            return _from_lark("start: " + " | ".join(texts))


def _from_lark(source: str) -> str:
    # By itself, a text that begins with a brace would pass for llguidance's internal notation.
    return json.dumps({"grammars": [{"lark_grammar": source}]})


def _from_schema(constraint: Constraint) -> str:
    try:
        schema = json.loads(constraint.source[0])
    except (ValueError, RecursionError) as error:
        raise _refused(constraint, f"it is not JSON ({error})") from None
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise _refused(constraint, f"a schema is an object, and this is {json.dumps(schema)[:64]}")
    return str(
        LLMatcher.grammar_from_json_schema(
            schema,
            # What a schema's own "x-guidance" may change...
            defaults={"whitespace_pattern": _JSON_WHITESPACE},
            # ...and what it may not: what cannot be held to is refused.
            overrides={"lenient": False, "coerce_one_of": False},
        )
    )


def _refused(constraint: Constraint, reason: str) -> InvalidRequest:
    return InvalidRequest(Violation(field_of(constraint), reason))


class ConstraintChecker:
    """Tries the constraints of requests out, in a process that a bad one may end.

    The process is started by the first constrained request, which takes a second, and lives until
    `close`, or this process' end. Methods may be called from any thread; `check` blocks.
    """

    def __init__(self, codec: TextCodec, end_tokens: Collection[int]) -> None:
        """`end_tokens`: all of the model's."""
        self._codec = codec
        self._end_tokens = [token for token in end_tokens if token < codec.size]
        self._lock = threading.Lock()
        self._sandbox: subprocess.Popen[bytes] | None = None
        self._unsupported = ""
        self._closed = False
        # What is wrong with grammars, "" for those that are good, by their SHA-256.
        self._faults: OrderedDict[bytes, str] = OrderedDict()

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` if the request's constraint cannot be held to, or if what was
        generated breaks it already; `Unavailable` where no process can be had to try it out in.
        Takes 0.25 s of a core at most, 2 ms as a rule."""
        constraint = request.constraint
        if constraint is None:
            return
        grammar = to_grammar(constraint)
        with self._lock:
            verdict = self._judged(Trial(grammar, list(request.generated)))
        if verdict.position >= 0:
            raise InvalidRequest(
                Violation(
                    "generated",
                    f"{verdict.fault} at index {verdict.position}: send what the same request "
                    "generated",
                )
            )
        if verdict.fault:
            raise _refused(constraint, verdict.fault)

    def close(self) -> None:
        """End the process, also while it tries something out: `check` raises `Unavailable` then and
        from here on. Waits for no trial. Idempotent."""
        self._closed = True
        if self._lock.acquire(blocking=False):
            self._end()
            self._lock.release()
        elif (sandbox := self._sandbox) is not None:
            sandbox.kill()  # and whoever waits for its answer buries it

    def _judged(self, trial: Trial) -> Verdict:
        """What is known of the grammar, or what a trial says."""
        key = hashlib.sha256(trial.grammar.encode(errors="surrogatepass")).digest()
        known = self._faults.get(key)
        if known is not None and (known or not trial.tokens):
            self._faults.move_to_end(key)
            return Verdict(known)
        verdict = self._try(trial)
        # Tokens can be what takes a trial too long.
        if not verdict.fault or not trial.tokens:
            self._faults[key] = verdict.fault
            if len(self._faults) > _VERDICTS_KEPT:
                self._faults.popitem(last=False)
        return verdict

    def _try(self, trial: Trial) -> Verdict:
        try:
            return self._asked(trial)
        except OSError:  # somebody ended it
            self._end()
        try:
            return self._asked(trial)
        except OSError as error:
            self._end()
            raise Unavailable(
                f"no process can be had to try the constraint out in ({error}): try again later"
            ) from error

    def _asked(self, trial: Trial) -> Verdict:
        if self._closed:
            raise Unavailable("constraints are tried out no more: the server is shutting down")
        if self._sandbox is None and not self._unsupported:
            self._start()
        if self._unsupported:
            return Verdict(f"this model's texts cannot be held to any: {self._unsupported}")
        return self._ask(trial)

    def _start(self) -> None:
        try:
            tokenizer = Tokenizer(self._codec.tokenizer_json, self._end_tokens)
        # A tokenizer is foreign code: it may fail with anything.
        except Exception as error:
            self._unsupported = f"the tokenizer cannot be read ({type(error).__name__}: {error})"
            return
        self._sandbox = subprocess.Popen(
            [sys.executable, "-m", "shards.grammar_sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._unsupported = self._ask(tokenizer).fault
        if self._unsupported:
            self._end()

    def _ask(self, question: Tokenizer | Trial) -> Verdict:
        sandbox = self._sandbox
        assert sandbox is not None
        assert sandbox.stdin is not None
        assert sandbox.stdout is not None
        if self._closed:  # since before it was started, so that nobody else has ended it
            raise BrokenPipeError("the checker is closed")
        sandbox.stdin.write(msgspec.json.encode(question) + b"\n")
        sandbox.stdin.flush()
        waiting = select.poll()
        waiting.register(sandbox.stdout, select.POLLIN)
        if not waiting.poll(_PATIENCE_MS):
            raise TimeoutError(f"the grammar sandbox said nothing for {_PATIENCE_MS // 1000} s")
        answer = sandbox.stdout.readline()
        if not answer:
            raise BrokenPipeError("the grammar sandbox ended")
        return msgspec.json.decode(answer, type=Verdict)

    def _end(self) -> None:
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.kill()
            sandbox.communicate()
