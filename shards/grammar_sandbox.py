"""Tries grammars out in processes of their own, which they may stall, bloat or crash.

`python -m shards.grammar_sandbox` reads a line of JSON from its standard input, the tokenizer, and
then one for each `Trial`; it answers every line with one. Each trial is a fork that ends with it,
so that it costs a millisecond, and none leaves anything behind.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from typing import BinaryIO

import msgspec
import psutil

from shards.grammar import GrammarError, GrammarTokenizer

CPU_SECONDS = 0.25
"""What compiling a grammar may take. Rank 0 compiles it once more, between two steps."""

_MEMORY = 512 << 20
# A quarter of a thread's usual stack: what passes here does not overflow one of a rank's.
_STACK = 2 << 20


class Tokenizer(msgspec.Struct, frozen=True):
    """What grammars are tried over; the fields are those of `GrammarTokenizer`."""

    tokenizer_json: str
    end_tokens: list[int]


class Trial(msgspec.Struct, frozen=True):
    """A grammar, and tokens that its text is to begin with."""

    grammar: str
    tokens: list[int] = []


class Verdict(msgspec.Struct, frozen=True):
    """What is wrong with a trial or a tokenizer, "" if nothing is. `position` is that of the token
    at fault, -1 where the grammar is."""

    fault: str = ""
    position: int = -1


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer every line of `requests` until it ends."""

    def answer(verdict: Verdict) -> None:
        answers.write(msgspec.json.encode(verdict) + b"\n")
        answers.flush()

    asked = msgspec.json.decode(requests.readline(), type=Tokenizer)
    try:
        tokenizer = GrammarTokenizer(asked.tokenizer_json, asked.end_tokens)
    except GrammarError as error:
        answer(Verdict(str(error)))
        return
    answer(Verdict())
    for line in requests:
        answer(_in_child(tokenizer, msgspec.json.decode(line, type=Trial)))


def _in_child(tokenizer: GrammarTokenizer, trial: Trial) -> Verdict:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run(tokenizer, trial, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if told:
        return msgspec.json.decode(told, type=Verdict)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return Verdict(f"compiling it takes more than {CPU_SECONDS:g} s: simplify it")
    return Verdict("it is nested too deeply, or takes too much memory: simplify it")


def _run(tokenizer: GrammarTokenizer, trial: Trial, writer: int) -> None:
    """The child's whole life."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is doing
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    most = psutil.Process().memory_info().vms + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK)

    def judge() -> None:
        # What is nested deeply can overflow the stack also when it is freed, which is by then.
        os.write(writer, msgspec.json.encode(_judge(tokenizer, trial)))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    os._exit(0)


def _judge(tokenizer: GrammarTokenizer, trial: Trial) -> Verdict:
    try:
        matcher = tokenizer.compile(trial.grammar)
    except GrammarError as error:
        return Verdict(str(error))
    for position, token in enumerate(trial.tokens):
        if not matcher.advance(token):
            return Verdict(f"token {token} breaks the constraint", position)
    if not (matcher.complete or matcher.allowed((), tokenizer.size).any()):
        return Verdict(f"no text of this model's tokens satisfies it ({matcher.failed})")
    return Verdict()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
