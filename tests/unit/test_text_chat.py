"""Conversations come out of `TextCodec` as `transformers`' `apply_chat_template` renders them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import gguf
import pytest

import cluster.text.chat
from cluster.errors import InvalidRequest
from cluster.text import TextCodec
from cluster.text.watchdog import TookTooLong, Watchdog
from shards.errors import CheckpointError
from tests.unit import chat_templates
from tests.unit.tiny_tokenizers import TRICKY, byte_fallback, byte_level, metaspace

USER = {"role": "user", "content": "What is the weather in Z\u00fcrich?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Of a "place" <now>',
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                },
            },
        },
    }
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "weather", "arguments": {"place": "Z\u00fcrich", "days": [1, 2]}},
        }
    ],
}
RESULT = {"role": "tool", "content": "21", "tool_call_id": "abcdefghi", "name": "weather"}
ANSWER = {"role": "assistant", "content": "It is <b>21</b> degrees."}
SYSTEM = {"role": "system", "content": "  Be brief.\n"}
THOUGHT = {"role": "assistant", "content": "<think>hm</think>\n\nYes", "reasoning_content": "hm"}
CONVERSATIONS = {
    "one": [USER],
    "two": [USER, ANSWER, USER],
    "system": [SYSTEM, USER],
    "call": [USER, CALL, RESULT],
    "answered": [USER, CALL, RESULT, ANSWER, USER],
    "thought": [USER, THOUGHT, USER],
}
FAMILIES = {
    name: getattr(chat_templates, name)
    for name in (
        "LLAMA", "QWEN", "MISTRAL", "GEMMA", "HARMONY", "GLM", "GRANITE", "COHERE", "PHI"
    )
}  # fmt: skip


def tokenizer_with(template: Any):
    tokenizer = byte_level()
    tokenizer.bos_token = "<|user|>"
    tokenizer.chat_template = template
    return tokenizer


def codec_with(template: Any) -> TextCodec:
    return TextCodec(tokenizer_with(template))


def shown(codec: TextCodec, messages: list[dict[str, Any]], **options: Any) -> str:
    return codec.decode(codec.render_chat(messages, **options), skip_special_tokens=False)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, conversation: str, tools: Any) -> None:
    tokenizer, codec = tokenizer_with(FAMILIES[family]), codec_with(FAMILIES[family])
    messages = CONVERSATIONS[conversation]
    for prompt in (True, False):
        expected = of_transformers(tokenizer, messages, tools, prompt)
        if isinstance(expected, list):
            ids = codec.render_chat(messages, tools=tools, add_generation_prompt=prompt)
            assert ids == expected
            continue
        with pytest.raises(InvalidRequest) as refused:
            codec.render_chat(messages, tools=tools, add_generation_prompt=prompt)
        assert refused.value.violations[0].field == "messages"
        assert expected in str(refused.value)


def of_transformers(tokenizer: Any, messages: Any, tools: Any, prompt: bool) -> list[int] | str:
    """The ids, or the words with which the template refuses."""
    try:
        return tokenizer.apply_chat_template(
            messages, tools, add_generation_prompt=prompt, return_dict=False
        )
    except Exception as error:
        return str(error)


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("QWEN", {"enable_thinking": False}),
        ("QWEN", {"enable_thinking": True}),
        ("LLAMA", {"date_string": "1 Jan 2000"}),
        ("HARMONY", {"reasoning_effort": "high"}),
        ("GRANITE", {"documents": [{"title": "a", "text": "b"}], "controls": {"length": "long"}}),
        ("GEMMA", {"bos_token": "<begin>"}),
    ],
)
def test_template_arguments(family: str, arguments: dict[str, Any]) -> None:
    tokenizer, codec = tokenizer_with(FAMILIES[family]), codec_with(FAMILIES[family])
    expected = tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=False, **arguments
    )
    assert codec.render_chat([USER], template_arguments=arguments) == expected


@pytest.mark.parametrize("name", ["chat_template", "messages", "tools", "self", 3])
def test_arguments_that_others_set_are_refused(name: Any) -> None:
    with pytest.raises(InvalidRequest, match="leave it out") as refused:
        codec_with(chat_templates.GEMMA).render_chat([USER], template_arguments={name: "x"})
    assert refused.value.violations[0].field == f"template_arguments.{name}"


@pytest.mark.parametrize("family", ["GEMMA", "PHI", "QWEN", "LLAMA"])
def test_the_last_message_goes_on(family: str) -> None:
    tokenizer, codec = tokenizer_with(FAMILIES[family]), codec_with(FAMILIES[family])
    messages = [USER, {"role": "assistant", "content": "It is 2 "}]
    expected = tokenizer.apply_chat_template(
        messages, continue_final_message=True, return_dict=False
    )
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert codec.render_chat(messages, **options) == expected
    assert shown(codec, messages, **options).rstrip().endswith("It is 2")
    with pytest.raises(InvalidRequest, match="set one of them") as refused:
        codec.render_chat(messages, continue_final_message=True)
    assert refused.value.violations[0].field == "continue_final_message"


def test_arguments_of_calls_may_be_json_text() -> None:
    """As OpenAI's messages have them; templates want objects, DeepSeek's the text."""
    function = CALL["tool_calls"][0]["function"]
    text = json.dumps(function["arguments"])
    as_text = {**CALL, "tool_calls": [{"function": {**function, "arguments": text}}]}
    for family in ("QWEN", "LLAMA", "HARMONY"):
        codec = codec_with(FAMILIES[family])
        assert codec.render_chat([USER, as_text]) == codec.render_chat([USER, CALL])
    deepseek = codec_with(chat_templates.DEEPSEEK)
    assert f"```json\n{text}\n```" in shown(deepseek, [USER, as_text])
    broken = {**CALL, "tool_calls": [{"function": {"name": "weather", "arguments": "{"}}]}
    assert '"arguments": {}' in shown(codec_with(chat_templates.QWEN), [USER, broken])


def test_templates_by_name_are_chosen_by_tools() -> None:
    codec = codec_with(chat_templates.COHERE)
    assert shown(codec, [USER]).startswith("<|USER|>")
    assert shown(codec, [USER], tools=TOOLS).startswith("def weather: <|user|>")
    assert shown(codec, [USER], tools=[]).startswith("<|USER|>")
    only_rag = codec_with({"rag": "x"})
    with pytest.raises(InvalidRequest, match="rag"):
        only_rag.render_chat([USER])


@pytest.mark.parametrize(
    ("template", "supported"),
    [
        *((FAMILIES[name], name not in ("GEMMA", "PHI")) for name in FAMILIES),
        ("{# no tools #}use your tools{{ 'tools' }}", False),
        ("{% for", False),
    ],
)
def test_supports_tools(template: Any, supported: bool) -> None:
    assert codec_with(template).supports_tools is supported


def test_without_a_template_there_are_no_tools() -> None:
    assert not TextCodec(metaspace()).supports_tools


def test_template_files_beside_a_tokenizer(tmp_path: Path) -> None:
    byte_level().save_pretrained(str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    codec = TextCodec.load(str(tmp_path))
    assert codec is not None
    assert shown(codec, [{"role": "user", "content": "he"}]) == "file he"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(
        "tool {{ tools|length }}"
    )
    codec = TextCodec.load(str(tmp_path))
    assert codec is not None
    assert shown(codec, [USER], tools=TOOLS) == "tool 1"


def test_named_templates_of_a_gguf() -> None:
    from cluster.text.gguf_tokenizer import build_tokenizer

    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["d", "t"],
        "tokenizer.ggml.token_type": [gguf.TokenType.NORMAL] * 2,
        "tokenizer.chat_template": "d",
        "tokenizer.chat_template.tool_use": "t",
        "tokenizer.chat_templates": 1,
    }
    tokenizer = build_tokenizer(metadata)
    assert tokenizer is not None
    codec = TextCodec(tokenizer)
    assert shown(codec, [USER]) == "d"
    assert shown(codec, [USER], tools=TOOLS) == "t"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only in verse') }}", "only in verse"),
        ("{% for x in %}", "syntax error in line 1"),
        ("a\n{% endif %}", "syntax error in line 2"),
        ("{{ messages.nothing.more }}", "nothing"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|__class__"),
        ("{{ raise_exception.__globals__.os }}", "unsafe|__globals__"),
        ("{{ messages.append(1) }}", "append|unsafe|not safely callable"),
        ("{{ range(10**9) | list }}", "Range|range"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include '/etc/passwd' %}", "loader"),
    ],
)
def test_what_a_template_cannot_do(template: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        codec_with(template).render_chat([USER])
    assert [fault.field for fault in refused.value.violations] == ["messages"]


def test_a_message_that_is_no_object_is_named() -> None:
    with pytest.raises(InvalidRequest, match="str") as refused:
        codec_with(chat_templates.PHI).render_chat([USER, "hello"])  # type: ignore[list-item]
    assert refused.value.violations[0].field == "messages[1]"


def test_a_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.text.chat, "_watchdog", Watchdog(0.05))
    endless = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    )
    codec = codec_with(endless)
    with pytest.raises(InvalidRequest, match=r"took more than 0\.05 s"):
        codec.render_chat([USER])


def test_a_watchdog_bites_the_late_alone() -> None:
    watchdog = Watchdog(0.05)
    bitten: dict[str, bool] = {}
    quick = threading.Event()

    def work(name: str, late: bool) -> None:
        try:
            with watchdog.watch():
                while late:
                    pass
            if not late:
                quick.wait(10)  # outside the block: the limit is none of its business
            bitten[name] = False
        except TookTooLong:
            bitten[name] = True

    threads = [
        threading.Thread(target=work, args=(name, late))
        for name, late in (("quick", False), ("late", True))
    ]
    for thread in threads:
        thread.start()
    threads[1].join()
    quick.set()
    threads[0].join()
    assert bitten == {"quick": False, "late": True}


@pytest.mark.parametrize("make", [byte_level, metaspace, byte_fallback])
def test_a_packed_codec_is_the_same(make) -> None:
    codec = TextCodec(make(), (3, 5))
    again = TextCodec.unpack(codec.pack())
    assert again.eos_token_ids == codec.eos_token_ids
    assert again.size == codec.size
    assert again.tokenizer_json == codec.tokenizer_json
    for text in TRICKY:
        for special in (True, False):
            ids = codec.encode(text, special)
            assert again.encode(text, special) == ids
            assert again.decode(ids, special) == codec.decode(ids, special)
    assert again.has_chat_template == codec.has_chat_template
    if codec.has_chat_template:
        assert again.render_chat([USER]) == codec.render_chat([USER])
    assert again.pack() == codec.pack()


def test_a_packed_codec_keeps_its_templates() -> None:
    codec = codec_with(chat_templates.COHERE)
    again = TextCodec.unpack(codec.pack())
    for tools in (None, TOOLS):
        assert again.render_chat([USER], tools=tools) == codec.render_chat([USER], tools=tools)
    assert again.supports_tools


@pytest.mark.parametrize("data", [b"", b"{}", b'{"format": "other"}', b"\x80\x04\x95"])
def test_other_bytes_are_no_codec(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="packed tokenizer"):
        TextCodec.unpack(data)


def test_tokenizer_json_is_the_fast_tokenizer() -> None:
    from tokenizers import Tokenizer

    codec = TextCodec(byte_level())
    again = Tokenizer.from_str(codec.tokenizer_json)
    for text in TRICKY:
        assert again.encode(text).ids == codec.encode(text)
