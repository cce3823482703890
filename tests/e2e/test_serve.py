"""`headwise serve` as a user runs it: another process, a real Ray, two shards, the SDK."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from headwise import (
    Client,
    DeadlineExceededError,
    FinishReason,
    HealthState,
    InvalidRequestError,
    NotFoundError,
)
from tests.models import save, tiny_model

ROOT = Path(__file__).resolve().parents[2]
# What the command promises is 5 s; a machine that runs other things too is given twice that.
END_SECONDS = 10


def headwise(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = headwise(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@dataclass
class Server:
    process: subprocess.Popen[str]
    ready: dict[str, Any]
    folder: Path

    @property
    def address(self) -> str:
        return str(self.ready["grpc"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, 9 heads over 3 KV heads, without a tokenizer."""
    return save(tiny_model("llama"), tmp_path_factory.mktemp("tiny"))


def start(model: Path, *options: str) -> Server:
    # Short, because Ray's sockets lie below it and their paths are limited.
    folder = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
    process = headwise(
        *("serve", "--model", model, "-n", "2", "--grpc-port", "0", "--kv-memory", "1MB"),
        *("--http-port", "0"),
        *("--json", *options),
        TMPDIR=str(folder),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"no ready line: {process.communicate()[1]}")
    return Server(process, json.loads(line), folder)


def end(server: Server, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
    """Exit code and stderr; fails if it takes too long."""
    server.process.send_signal(number)
    try:
        _, err = server.process.communicate(timeout=END_SECONDS)
    finally:
        server.process.kill()
    return server.process.returncode, err


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    server = start(model, "--max-sequences", "16")
    yield server
    end(server)
    shutil.rmtree(server.folder)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address, timeout=60) as client:
        yield client


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within 30 s: {what}")
        time.sleep(0.02)


def prompt(number: int) -> list[int]:
    return [(7 * number + step) % 131 for step in range(3 + number % 5)]


def test_the_ready_line_says_where_and_which_rank_holds_what(server: Server) -> None:
    assert server.ready["event"] == "ready"
    assert server.ready["model"]["heads"] == 9
    assert [rank["heads"] for rank in server.ready["ranks"]] == [[0, 5], [5, 9]]
    assert len({rank["pid"] for rank in server.ready["ranks"]}) == 2
    assert server.ready["kv_tokens"] > 0


def test_sixteen_streams_at_a_time_each_equal_their_solo_run(client: Client) -> None:
    def ask(number: int) -> tuple[int, ...]:
        return client.generate(
            prompt(number), max_tokens=24, temperature=0.8, seed=number
        ).token_ids

    solo = [ask(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))

    assert together == solo
    assert len(set(solo)) > 1
    assert {len(tokens) for tokens in solo} == {24}


def test_a_cancelled_stream_frees_its_kv_cache(client: Client) -> None:
    with client.stream(prompt(1), max_tokens=240) as stream:
        next(stream)
        assert client.load().kv_blocks_used > 0
        stream.cancel()

    until(lambda: client.load().kv_blocks_used == 0, "no KV block is in use")
    assert client.load().running == 0


def test_a_deadline_ends_the_work(client: Client) -> None:
    with pytest.raises(DeadlineExceededError):
        client.generate(prompt(2), max_tokens=240, timeout=0.05)

    until(lambda: client.load().running == 0, "nothing runs")


def test_abort_ends_another_ones_request(client: Client) -> None:
    with client.stream(prompt(3), max_tokens=240, request_id="long-one") as stream:
        next(stream)
        assert client.abort("long-one")
        assert stream.result().finish_reason is FinishReason.ABORTED


def test_bad_requests_get_their_status_and_disturb_nobody(client: Client) -> None:
    expected = client.generate(prompt(4), max_tokens=64, temperature=0).token_ids
    with client.stream(prompt(4), max_tokens=64, temperature=0) as stream:
        next(stream)
        with pytest.raises(InvalidRequestError) as caught:
            client.generate([5, 131], max_tokens=0, temperature=-1, top_p=0)
        with pytest.raises(InvalidRequestError):
            client.generate("text", max_tokens=1)
        with pytest.raises(NotFoundError):
            client.generate(prompt(4), model="another", max_tokens=1)
        assert stream.result().token_ids == expected

    fields = {violation.field for violation in caught.value.violations}
    assert fields >= {"prompt", "stopping.max_tokens", "sampling.temperature", "sampling.top_p"}


def test_logprobs_of_prompt_and_answer(client: Client) -> None:
    answer = client.generate(prompt(5), max_tokens=4, temperature=0, logprobs=2, prompt_logprobs=0)

    assert len(answer.prompt_logprobs) == len(prompt(5))
    assert answer.prompt_logprobs[0].logprob is None
    for entry in answer.choices[0].logprobs:
        assert entry.rank == 1
        assert entry.top[0].token_id == entry.token_id
        assert entry.logprob is not None
        assert entry.top[1].logprob <= entry.logprob <= 0


def test_a_resumed_request_goes_on_at_the_next_token(client: Client) -> None:
    whole = client.generate(prompt(6), max_tokens=12, temperature=0.9, seed=3).token_ids
    rest = client.generate(
        prompt(6), max_tokens=12, temperature=0.9, seed=3, generated=whole[:5]
    ).token_ids

    assert rest == whole[5:]


def test_info_and_health(client: Client, server: Server) -> None:
    info, health = client.server_info(), client.health()

    assert (info.tensor_parallel, info.device, info.collective) == (2, "cpu", "shared_memory")
    assert [rank.pid for rank in info.ranks] == [rank["pid"] for rank in server.ready["ranks"]]
    assert health.state is HealthState.READY
    assert [rank.state for rank in health.ranks] == [HealthState.READY] * 2


def test_a_stream_outlives_a_rank(server: Server) -> None:
    """Without any help of the SDK: to its reader the death is a pause."""
    with Client(server.address, timeout=120, retries=0) as client:
        options: dict[str, Any] = {
            "max_tokens": 240,
            "temperature": 0.8,
            "seed": 5,
            "resume": False,
        }
        expected = client.generate(prompt(7), **options).token_ids
        epoch, victim = client.health().epoch, client.server_info().ranks[1].pid
        with client.stream(prompt(7), **options) as stream:
            next(stream)
            os.kill(victim, signal.SIGKILL)
            assert stream.result().token_ids == expected
        until(lambda: client.health().state is HealthState.READY, "the ranks are ready")
        assert client.health().epoch == epoch + 1
        ranks = client.server_info().ranks
    assert victim not in [rank.pid for rank in ranks]
    server.ready["ranks"][1]["pid"] = ranks[1].pid


def test_the_status_command(server: Server) -> None:
    code, out, _ = run("status", "--address", server.address, "--json")
    shown, text, _ = run("status", "--address", server.address)

    assert (code, shown) == (0, 0)
    status = json.loads(out)
    assert status["health"]["state"] == "ready"
    assert len(status["server"]["ranks"]) == 2
    assert "ready" in text


def test_client_commands_against_nobody_are_one_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        code, out, err = run("status", "--address", address, "--timeout", "2")

    assert (code, out) == (1, "")
    assert err.startswith(f"headwise: {address}: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_leaves_nothing(model: Path, number: signal.Signals) -> None:
    server = start(model, "--drain-timeout-s", "1")
    family = [server.process.pid, *(rank["pid"] for rank in server.ready["ranks"])]
    family += [child.pid for child in psutil.Process(family[0]).children(recursive=True)]
    with Client(server.address) as client, client.stream(prompt(1), max_tokens=200) as stream:
        next(stream)
        code, err = end(server, number)

    assert code == 0, err
    assert "Traceback" not in err
    # A zombie is dead; who adopted it has not buried it yet.
    assert [pid for pid in family if _is_alive(pid)] == []
    assert list(server.folder.iterdir()) == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(server.address.rpartition(":")[2])))
    server.folder.rmdir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_leaves_nothing(model: Path, number: signal.Signals) -> None:
    folder = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
    process = headwise(
        "serve", "--model", model, "--grpc-port", "0", "--http-port", "0", TMPDIR=str(folder)
    )
    until(lambda: bool(list(folder.iterdir())), "its directory is there")
    process.send_signal(number)
    out, err = process.communicate(timeout=END_SECONDS)

    assert (process.returncode, out) == (128 + number, ""), err
    assert err == f"headwise: {number.name} during the start: everything is stopped\n"
    assert list(folder.iterdir()) == []
    folder.rmdir()


def test_nothing_outlives_a_killed_command(model: Path) -> None:
    server = start(model)
    family = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.communicate()

    until(lambda: list(server.folder.iterdir()) == [], "its directory is gone")
    until(lambda: not any(_is_alive(process.pid) for process in family), "its processes are gone")
    server.folder.rmdir()


def test_no_other_user_can_read_its_directory(server: Server) -> None:
    (directory,) = server.folder.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tensor-parallel", "10"), "9 attention heads over tensor_parallel=10"),
        (("--tensor-parallel", "0"), "tensor_parallel"),
        (("--capacity", "1,1", "--tensor-parallel", "3"), "capacity lists 2 ranks"),
        (("--kv-memory", "100TB"), "GiB"),
        (("--kv-memory", "lots"), "kv_memory"),
        (("--cpus-per-rank", "1000"), "CPUs"),
        (("--tls-certificate", "x.pem"), "tls_key"),
        (("--tls-certificate", "no.pem", "--tls-key", "no.key"), "no.pem cannot be read"),
        (("--token-file", "no-such-file"), "no-such-file"),
        (("--host", "192.0.2.1"), "192.0.2.1"),
        (("--config", "no-such.yaml"), "no-such.yaml cannot be read"),
        (("--device", "cuda"), "GPU"),
    ],
)
def test_a_start_that_must_fail_says_why_in_one_sentence(
    model: Path, options: tuple[str, ...], words: str
) -> None:
    if "cuda" in options and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    code, out, err = run("serve", "--model", model, "--grpc-port", "0", *options)

    assert code != 0
    assert out == ""
    assert words in err
    assert len(err.strip().splitlines()) == 1, err


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    code, _, err = run("serve", "--model", tmp_path / "nowhere")

    assert code == 1
    assert str(tmp_path / "nowhere") in err
    assert len(err.strip().splitlines()) == 1, err


def test_a_model_of_an_unknown_architecture(tmp_path: Path) -> None:
    config = {"architectures": ["MysteryForCausalLM"], "model_type": "mystery"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = run("serve", "--model", tmp_path)

    assert code == 1
    assert "MysteryForCausalLM" in err or "mystery" in err
    assert len(err.strip().splitlines()) == 1, err


def test_a_corrupt_checkpoint(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    code, _, err = run("serve", "--model", tmp_path / "model", "--grpc-port", "0")

    assert code == 1
    assert "model.safetensors" in err
    assert len(err.strip().splitlines()) == 1, err


def test_a_port_in_use(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--model", model, "--grpc-port", str(port))

    assert code == 1
    assert f"127.0.0.1:{port}" in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cluster: {model: m, tensor_paralell: 2}", "tensor_paralell"),
        ("[1, 2]", "mapping"),
        ("a: [", "YAML"),
        ("tensor_parallel: 2", "--model is missing"),
        ("model: m\nreplicas: 2", "replicas"),
    ],
)
def test_a_bad_config_file(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    code, _, err = run("serve", "--config", path)

    assert code == 1
    assert words in err
    assert len(err.strip().splitlines()) == 1, err


def test_help_and_version_are_there() -> None:
    assert run("--version")[1].startswith("headwise ")
    assert "--tensor-parallel" in run("serve", "--help")[1]
