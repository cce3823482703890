"""Every example runs, as a user would run it, against an edge whose answers are known."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.request import Request
from tests.unit.client_faults import EdgeThread, Loop
from tests.unit.client_server import PATIENCE
from tests.unit.fakes import EOS, FakeCodec, FakeGenerator, alphabet
from tests.unit.http_server import running_api
from tests.unit.tiny_tokenizers import byte_level

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REVIEW = '{"product": "kettle", "sentiment": "good", "stars": 5}'
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def answer(request: Request, index: int) -> Iterator[int]:
    """The alphabet, or what the constraint of the example allows."""
    if request.constraint is None:
        return alphabet(request, index)
    text = REVIEW if request.constraint.language == "json_schema" else "yes"
    return iter([*text.encode(), EOS])


class ConstrainingCodec(FakeCodec):
    """With a tokenizer for the server to try constraints over."""

    tokenizer_json = byte_level().backend_tokenizer.to_str()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def edge(loop: Loop) -> Iterator[EdgeThread]:
    edge = EdgeThread(loop, FakeGenerator(answer), ConstrainingCodec())
    yield edge
    edge.stop()


def output_of(example: str, address: str, typed: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / example), address]
    run = subprocess.run(
        command, input=typed, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_quick_start(edge: EdgeThread) -> None:
    assert output_of("quick_start.py", edge.address) == "abcdefghijklmnop\n"


def test_streaming(edge: EdgeThread) -> None:
    assert output_of("streaming.py", edge.address) == (LETTERS * 4)[:80] + "\n"


def test_async_fan_out(edge: EdgeThread) -> None:
    lines = output_of("async_fan_out.py", edge.address).splitlines()
    assert lines[31] == "The square of 31 is 'abcdefgh'"
    assert len(lines) == 32


def test_chat_loop(edge: EdgeThread) -> None:
    lines = output_of("chat_loop.py", edge.address, typed="hello\nand then?\n").splitlines()
    assert lines == [(LETTERS * 5)[:128]] * 2
    assert isinstance(edge.generator, FakeGenerator)
    last = bytes(token for token in edge.generator.requests[-1].prompt if token < 256).decode()
    assert last.startswith("system: Answer in one sentence.\nuser: hello\nassistant: abc")


def test_structured_output(edge: EdgeThread) -> None:
    assert output_of("structured_output.py", edge.address) == "kettle: good, 5 stars\nyes\n"


def test_resume(loop: Loop) -> None:
    def halts(request: Request, index: int) -> Iterator[int]:
        for position, token in enumerate(alphabet(request, index)):
            if position == 99 and not request.generated:
                generator.pause()
            yield token

    generator = FakeGenerator(halts)
    edge = EdgeThread(loop, generator)
    command = [sys.executable, str(EXAMPLES / "resume.py"), edge.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        text = run.stdout.read(100)
        edge.stop()
        loop.loop.call_soon_threadsafe(generator.resume)
        edge.start()
        text += run.stdout.read()
        assert run.wait(PATIENCE) == 0
    edge.stop()
    assert text == (LETTERS * 12)[:300] + "\n"
    assert len(generator.requests[-1].generated) == 100


async def test_openai_client() -> None:
    async with running_api() as running:
        address = f"{running.api.url}/v1"
        output = await asyncio.to_thread(output_of, "openai_client.py", address)
    assert output == "abcdefgh\n" + (LETTERS * 3)[:64] + "\n"


def test_every_example_is_listed_and_tested() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    tested = Path(__file__).read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f"({example.name})" in listed
        assert f'"{example.name}"' in tested
