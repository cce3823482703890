"""Arguments that no message can carry are refused before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from headwise import InvalidRequestError, RetryPolicy, TLSOptions
from tests.unit.client_server import CLIENTS, AnyClient, ScriptedServer, finish, says

MESSAGE = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest, server: ScriptedServer) -> Iterator[AnyClient]:
    with request.param(server.address) as client:
        yield client


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([1, -1], {}, "prompt[1]"),
        ([2**32], {}, "prompt[0]"),
        ("\ud800", {}, "prompt"),
        ("a", {"top_k": -1}, "top_k"),
        ("a", {"max_tokens": -5}, "max_tokens"),
        ("a", {"min_tokens": 2**40}, "min_tokens"),
        ("a", {"n": -1}, "n"),
        ("a", {"seed": -1}, "seed"),
        ("a", {"seed": 2**64}, "seed"),
        ("a", {"logprobs": -1}, "logprobs"),
        ("a", {"prompt_logprobs": -1}, "prompt_logprobs"),
        ("a", {"priority": 2**31}, "priority"),
        ("a", {"logit_bias": {-1: 1.0}}, "logit_bias[-1]"),
        ("a", {"stop": ["b", "\ud800"]}, "stop[1]"),
        ("a", {"stop_token_ids": [1, 2, -3]}, "stop_token_ids[2]"),
        ("a", {"generated": [-1]}, "generated[0]"),
        ("a", {"request_id": "\udfff"}, "request_id"),
        ("a", {"beam_width": -1}, "beam_width"),
        ("a", {"regex": "\ud800"}, "regex"),
        ("a", {"choices": ["b", "\ud800"]}, "choices[1]"),
        ("a", {"regex": "a", "choices": ["b"]}, "choices"),
        ("a", {"json_schema": {"const": {1, 2}}}, "json_schema"),
    ],
)
def test_values_out_of_range_are_named(
    server: ScriptedServer, client: AnyClient, prompt: Any, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(prompt, **options)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert caught.value.code is None
    assert server.calls == []


def test_every_value_out_of_range_is_named(client: AnyClient) -> None:
    with pytest.raises(InvalidRequestError, match=r"n: -2 is not in \[0, 4294967295\]; top_k: -1"):
        client.generate("a", n=-2, top_k=-1, seed=3)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (b"bytes", {}, "prompt must be text or a sequence of token ids, not bytes"),
        (None, {}, "prompt must be text or a sequence of token ids, not NoneType"),
        (5, {}, "prompt must be text"),
        ({"role": "user"}, {}, "prompt must be text"),
        (["a", "b"], {}, r"prompt\[0\] must be a token id \(int\), not str"),
        ([1, 2.0], {}, r"prompt\[1\] must be a token id \(int\), not float"),
        ("a", {"max_tokens": "5"}, "max_tokens must be int, not str"),
        ("a", {"max_tokens": 5.0}, "max_tokens must be int, not float"),
        ("a", {"temperature": "hot"}, "temperature must be float, not str"),
        ("a", {"ignore_eos": "no"}, "ignore_eos must be bool, not str"),
        ("a", {"model": b"m"}, "model must be str, not bytes"),
        ("a", {"stop": [None]}, r"stop\[0\] must be str, not NoneType"),
        ("a", {"stop": 5}, "stop must be text or a sequence of texts, not int"),
        ("a", {"stop_token_ids": 5}, "stop_token_ids must be a sequence of token ids, not int"),
        ("a", {"stop_token_ids": ["x"]}, r"stop_token_ids\[0\] must be int, not str"),
        ("a", {"generated": "x"}, "generated must be a sequence of token ids, not str"),
        ("a", {"logit_bias": [1]}, "logit_bias must map token ids to floats, not list"),
        ("a", {"logit_bias": {"5": 1.0}}, "logit_bias must map token ids to floats, not '5'"),
        ("a", {"beam_width": 2.0}, "beam_width must be int, not float"),
        ("a", {"json_schema": 5}, "json_schema must be a pydantic model, a dict or JSON text"),
        ("a", {"regex": b"a"}, "regex must be str, not bytes"),
        ("a", {"choices": "ab"}, "choices must be a sequence of texts, not str"),
        ("a", {"choices": [5]}, r"choices\[0\] must be str, not int"),
        ("a", {"cache": "no"}, "cache must be bool, not str"),
        ("a", {"max_token": 5}, "unknown option 'max_token'; did you mean 'max_tokens'"),
    ],
)
def test_wrong_types_are_named(
    server: ScriptedServer, client: AnyClient, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        client.generate(prompt, **options)
    assert server.calls == []


@pytest.mark.parametrize(
    ("messages", "kind", "message"),
    [
        ("hi", TypeError, "messages must be a sequence of messages, not str"),
        (MESSAGE, TypeError, "messages must be a sequence of messages, not dict"),
        ([MESSAGE, "hi"], TypeError, r"messages\[1\] must be a ChatMessage or a dict, not str"),
        ([{"role": "user"}], ValueError, r"messages\[0\] must have 'role' and 'content'"),
        ([MESSAGE | {"nam": "x"}], ValueError, "it has 'role', 'content', 'nam'"),
        ([{"role": "user", "content": None}], TypeError, r"messages\[0\]\.content must be str"),
        ([{"role": "user", "content": "\ud800"}], ValueError, r"messages\[0\]\.content: not valid"),
    ],
)
def test_wrong_messages_are_named(
    client: AnyClient, messages: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        client.chat(messages)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tools": [5]}, TypeError, r"tools\[0\] must be a Tool or a dict, not int"),
        ({"tools": [{"description": "x"}]}, ValueError, r"tools\[0\] must have 'name'"),
        ({"tools": [{"name": "x", "strict": True}]}, ValueError, "it has 'name', 'strict'"),
        ({"template_arguments": [1]}, TypeError, "template_arguments must be a dict, not list"),
        ({"template_arguments": {"a": {1}}}, ValueError, "template_arguments: not values of JSON"),
    ],
)
def test_wrong_tools_are_named(
    client: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        client.chat([MESSAGE], **options)


def test_chat_has_no_echo(client: Any) -> None:
    with pytest.raises(TypeError, match="unknown option 'echo'"):
        client.chat([MESSAGE], echo=True)


def test_other_calls_name_their_arguments(client: Any) -> None:
    with pytest.raises(TypeError, match="prompt must be text or a sequence of messages"):
        client.tokenize(5)
    with pytest.raises(InvalidRequestError, match=r"token_ids\[1\]: -1 is not in"):
        client.detokenize([1, -1])
    with pytest.raises(TypeError, match="request_id must be str, not int"):
        client.abort(5)
    with pytest.raises(ValueError, match="timeout must be more than 0 seconds or None, not 0"):
        client.load(timeout=0)


def test_numpy_values_are_numbers() -> None:
    with ScriptedServer() as server:
        server.script(*[says(finish())] * len(CLIENTS))
        for kind in CLIENTS:
            with kind(server.address) as client:
                client.generate(np.arange(3), top_k=np.int64(5), temperature=np.float32(0.5))
        for call in server.calls:
            assert list(call.request.token_ids.ids) == [0, 1, 2]
            assert (call.request.sampling.top_k, call.request.sampling.temperature) == (5, 0.5)


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"address": "localhost"}, ValueError, "address must be host:port"),
        ({"address": "http://localhost:1"}, ValueError, "address must be host:port"),
        ({"address": "localhost:99999"}, ValueError, "address must be host:port"),
        ({"address": 50051}, TypeError, "address must be str or a list of them, not int"),
        ({"address": ["a:1", 5]}, TypeError, "address must be str, not int"),
        ({"address": []}, ValueError, "address is an empty list"),
        ({"address": ["127.0.0.1:1", "[::1]:1"]}, ValueError, "neither all an IPv4 nor all"),
        ({"address": ["127.0.0.1:1", "no.such.invalid:1"]}, ValueError, "neither all an IPv4"),
        (
            {"address": ["127.0.0.1:1", "127.0.0.1:2"], "tls": TLSOptions()},
            ValueError,
            "server_name is not set",
        ),
        ({"token": "a b"}, ValueError, "token must be visible ASCII"),
        ({"token": b"a"}, TypeError, "token must be str, not bytes"),
        ({"timeout": 0}, ValueError, "timeout must be more than 0"),
        ({"timeout": float("nan")}, ValueError, "timeout must be more than 0"),
        ({"retries": -1}, ValueError, "retries must not be negative"),
        (
            {"tls": TLSOptions(root_certificates=Path("/nonexistent/ca.pem"))},
            ValueError,
            r"tls\.root_certificates: cannot read /nonexistent/ca\.pem: No such file",
        ),
        (
            {"tls": TLSOptions(root_certificates=b"rubbish")},
            ValueError,
            r"tls\.root_certificates: the bytes given is not PEM",
        ),
    ],
)
def test_settings_of_a_client_are_checked(
    kind: type[Any], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    "address",
    ["localhost:1", "10.0.0.1:50051", "[::1]:1", "unix:/tmp/socket", "dns:///a.b:1", ["a.b:1"]],
)
@pytest.mark.parametrize("kind", CLIENTS)
def test_addresses(kind: type[Any], address: Any) -> None:
    with kind(address):
        pass


def test_the_token_is_not_shown() -> None:
    with pytest.raises(ValueError, match="token") as caught:
        CLIENTS[0](token="top secret")
    assert "secret" not in str(caught.value)


def test_options_are_checked() -> None:
    with pytest.raises(ValidationError, match="go together"):
        TLSOptions(private_key=b"-----BEGIN PRIVATE KEY-----")
    with pytest.raises(ValidationError, match="attempts"):
        RetryPolicy(attempts=0)
    assert "BEGIN" not in repr(TLSOptions(private_key=b"-----BEGIN", certificate_chain=b"x"))
