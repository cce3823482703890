"""TextCodec against the `transformers` tokenizer that it wraps."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cluster.errors import InvalidRequest
from cluster.text import TextCodec
from shards.errors import CheckpointError
from tests.unit.tiny_tokenizers import END, TRICKY, byte_fallback, byte_level, metaspace


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(byte_level())


def save(folder: Path) -> Path:
    byte_level().save_pretrained(str(folder))
    return folder


def load(folder: Path) -> TextCodec:
    codec = TextCodec.load(str(folder))
    assert codec is not None
    return codec


@pytest.mark.parametrize("make", [byte_level, metaspace, byte_fallback])
def test_equals_the_tokenizer(make) -> None:
    tokenizer = make()
    codec = TextCodec(make())
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert codec.encode(text) == ids
        assert codec.encode(text, add_special_tokens=False) == tokenizer.encode(
            text, add_special_tokens=False
        )
        for skip in (True, False):
            assert codec.decode(ids, skip) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_folder_equals_auto_tokenizer(tmp_path: Path) -> None:
    codec, reference = load(save(tmp_path)), AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TRICKY:
        assert codec.encode(text) == reference.encode(text)
    assert codec.size == len(reference)


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    file = save(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(content))
    assert len(load(tmp_path).encode("abcdef")) == 6


def test_a_folder_without_tokenizer_gives_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert TextCodec.load(str(tmp_path)) is None


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_an_error_that_names_the_folder(tmp_path: Path, content: str) -> None:
    (save(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        TextCodec.load(str(tmp_path))


@pytest.mark.parametrize(("eos", "names"), [(258, [258]), ([3, 258], [3, 258]), (None, [END])])
def test_end_tokens_of_generation_config(tmp_path: Path, eos: object, names: list) -> None:
    (save(tmp_path) / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    codec = load(tmp_path)
    further = [codec.encode(name)[0] if isinstance(name, str) else name for name in names]
    assert list(codec.eos_token_ids) == [codec.encode("<|endoftext|>")[0], *further]


def test_a_broken_generation_config_is_an_error(tmp_path: Path) -> None:
    (save(tmp_path) / "generation_config.json").write_text('{"eos_token_id": "two"}')
    with pytest.raises(CheckpointError, match="generation_config"):
        TextCodec.load(str(tmp_path))


def test_chat(codec: TextCodec) -> None:
    messages = [
        {"role": "user", "content": "he"},
        {"role": "assistant", "content": "ll"},
        {"role": "user", "content": "the"},
    ]
    text = codec.decode(codec.render_chat(messages), skip_special_tokens=False)
    assert text == ("<|user|>he<|end|>\n<|assistant|>ll<|end|>\n<|user|>the<|end|>\n<|assistant|>")
    assert codec.has_chat_template


@pytest.mark.parametrize(
    ("messages", "remedy"),
    [
        ([], "give at least one"),
        ([{"role": "system", "content": "x"}], "only user and assistant"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_a_refused_conversation_names_messages(
    codec: TextCodec, messages: list[dict[str, str]], remedy: str
) -> None:
    with pytest.raises(InvalidRequest, match=remedy) as refused:
        codec.render_chat(messages)
    assert [fault.field for fault in refused.value.violations] == ["messages"]


def test_no_chat_template() -> None:
    codec = TextCodec(metaspace())
    assert not codec.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        codec.render_chat([{"role": "user", "content": "a"}])


def test_a_lone_surrogate_names_the_prompt(codec: TextCodec) -> None:
    with pytest.raises(InvalidRequest, match="surrogate") as refused:
        codec.encode("a\udc80")
    assert [fault.field for fault in refused.value.violations] == ["prompt"]


def test_token_text_keeps_spaces_and_marks_parts_of_characters(codec: TextCodec) -> None:
    assert codec.token_text(codec.encode(" the")[0]) == " the"
    assert codec.token_text(codec.encode("€")[0]) == "\ufffd"
    assert codec.token_text(codec.encode(END)[0]) == END
    spaced = TextCodec(metaspace())
    assert spaced.token_text(spaced.encode("a")[0]) == " a"


def test_longest_token_bytes_bounds_every_text(codec: TextCodec) -> None:
    for text in TRICKY:
        assert len(text.encode()) <= codec.longest_token_bytes * len(codec.encode(text))


def test_threads_may_share_a_codec(codec: TextCodec) -> None:
    texts = [text * 200 for text in TRICKY]
    expected = [codec.encode(text) for text in texts]
    results: dict[int, list[list[int]]] = {}

    def work(thread: int) -> None:
        results[thread] = [codec.encode(text) for text in texts]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(4)] == [expected] * 4
