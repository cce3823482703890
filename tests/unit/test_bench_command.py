"""The command `headwise bench serve`: what it prints, and its exit code."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from deploy import cli
from deploy.bench.report import Report
from headwise.v1 import control_pb2
from tests.unit.client_server import Answer, ScriptedServer, fails, finish, says, token

Run = Callable[..., tuple[int, str, str]]

MODEL = control_pb2.GetModelInfoResponse(name="scripted", vocabulary=50, context=512)
OK = says(token("a", 1), token("b", 2), finish())
GONE = fails(grpc.StatusCode.INTERNAL, "internal error", after=(token("a", 1),))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, stdout, stderr of `headwise ARGUMENTS`."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headwise", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


def bench(
    run: Run, server: ScriptedServer, *options: str, answers: tuple[Answer, ...]
) -> tuple[int, str, str]:
    load = says(control_pb2.GetLoadResponse())
    server.script(says(MODEL), says(control_pb2.GetServerInfoResponse()), load, *answers, load)
    count = str(max(1, len(answers)))
    return run(
        *("bench", "serve", "--address", server.address, "--concurrency", "1", "--warmup", "0"),
        *("--requests", count, *options),
    )


def test_json_on_stdout_and_nothing_else(run: Run, server: ScriptedServer) -> None:
    code, out, err = bench(run, server, "--json", answers=(OK, GONE, OK))
    report = Report.model_validate_json(out)

    assert (code, err) == (0, "")
    assert (report.model, report.address) == ("scripted", server.address)
    assert (report.requests.sent, report.requests.succeeded) == (3, 2)
    assert [(each.status, each.count) for each in report.requests.failures] == [("INTERNAL", 1)]
    assert report.tokens.output is not None
    assert report.tokens.output.mean == 2
    assert [call.method for call in server.calls].count("Generate") == 3


def test_the_table_and_a_file(run: Run, server: ScriptedServer, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    code, out, _ = bench(run, server, "--output", str(path), answers=(OK,))

    assert code == 0
    assert "1 of 1 succeeded" in out
    assert "TTFT" in out
    assert Report.model_validate_json(path.read_text()).requests.succeeded == 1


def test_a_file_that_cannot_be_written_costs_no_results(run: Run, server: ScriptedServer) -> None:
    code, out, err = bench(run, server, "--output", "/nowhere/x.json", answers=(OK,))

    assert code == 1
    assert "1 of 1 succeeded" in out
    assert err.startswith("headwise: --output /nowhere/x.json cannot be written: No such file")


def test_no_success_at_all_is_a_failure(run: Run, server: ScriptedServer) -> None:
    code, out, _ = bench(run, server, answers=(GONE, GONE))

    assert code == 1
    assert "0 of 2 succeeded" in out
    assert "internal error" in out


def test_the_token_is_sent(run: Run, server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    bench(run, server, "--token-file", str(tmp_path / "token"), answers=(OK,))

    assert {call.metadata["authorization"] for call in server.calls} == {"Bearer s3cret"}


def test_nobody_at_the_address_is_one_sentence(run: Run) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        code, out, err = run("bench", "serve", "--address", address)

    assert (code, out) == (1, "")
    assert err.startswith(f"headwise: {address}: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rate", "0"), "--rate=0.0: input should be greater than 0"),
        (("--requests", "0", "--duration", "-1"), "--duration=-1.0"),
        (("--burstiness", "2"), "give a rate with it"),
        (("--timeout", "0"), "--timeout=0.0"),
        (("--address", "nonsense"), "address must be host:port"),
        (("--token-file", "no-such-file"), "no-such-file"),
    ],
)
def test_options_that_cannot_be_meant_are_one_sentence(
    run: Run, options: tuple[str, ...], words: str
) -> None:
    code, out, err = run("bench", "serve", *options)

    assert (code, out) == (1, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_lengths_beyond_the_context_are_one_sentence(run: Run, server: ScriptedServer) -> None:
    code, _, err = bench(run, server, "--input-len", "600", answers=())

    assert code == 1
    assert "more than the context of scripted, 512" in err
    assert len(err.splitlines()) == 1
