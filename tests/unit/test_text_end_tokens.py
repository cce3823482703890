"""Which tokens end an answer, from every place that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.text import TextCodec
from cluster.text.gguf_tokenizer import build_tokenizer
from shards.errors import CheckpointError
from shards.models.source import open_model
from tests.models import save, tiny_model
from tests.unit.tiny_tokenizers import END, byte_level

DOCUMENT = "<|endoftext|>"


def folder(path: Path, template: str | None = None, **files: dict[str, Any]) -> Path:
    tokenizer = byte_level()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(str(path))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def ends(path: Path) -> list[str]:
    codec = TextCodec.load(str(path))
    assert codec is not None
    return [codec.decode([token], skip_special_tokens=False) for token in codec.eos_token_ids]


def test_a_template_names_the_end_where_nothing_else_does(tmp_path: Path) -> None:
    assert ends(folder(tmp_path)) == [DOCUMENT, END]


def test_an_answer_followed_by_text_has_no_end_of_its_own(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }} and so on{% endfor %}"
    assert ends(folder(tmp_path, template)) == [DOCUMENT]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("<|user|>", [DOCUMENT, "<|user|>"]),
        (["<|user|>", DOCUMENT, "<|assistant|>"], [DOCUMENT, "<|user|>", "<|assistant|>"]),
        (None, [DOCUMENT, END]),
    ],
)
def test_generation_config_comes_before_the_template(
    tmp_path: Path, stated: str | list[str] | None, expected: list[str]
) -> None:
    tokenizer = byte_level()
    ids = None if stated is None else tokenizer.convert_tokens_to_ids(stated)
    assert ends(folder(tmp_path, generation_config={"eos_token_id": ids})) == expected


@pytest.mark.parametrize("wrong", ["two", [1, "2"], True, -1, 1.5, {}])
def test_what_is_no_token_id_is_refused(tmp_path: Path, wrong: Any) -> None:
    path = folder(tmp_path, generation_config={"eos_token_id": wrong})
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*eos_token_id"):
        TextCodec.load(str(path))


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (folder(tmp_path) / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config"):
        TextCodec.load(str(tmp_path))


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"eos": 3}, ["</s>"]),
        ({"eos": 3, "eot": 4}, ["</s>", "<|eot|>"]),
        ({"eos": 3, "eot": 4, "eom": 5}, ["</s>", "<|eot|>", "<|eom|>"]),
        ({"eot": 4}, ["<|eot|>"]),
        ({"eos": 4, "eot": 4}, ["<|eot|>"]),
        ({}, []),
    ],
)
def test_a_gguf_file_may_name_three(named: dict[str, int], expected: list[str]) -> None:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "c", "</s>", "<|eot|>", "<|eom|>"],
        **{f"tokenizer.ggml.{role}_token_id": token for role, token in named.items()},
    }
    tokenizer = build_tokenizer(metadata)
    assert tokenizer is not None
    codec = TextCodec(tokenizer)
    assert [metadata["tokenizer.ggml.tokens"][i] for i in codec.eos_token_ids] == expected
    assert codec.decode(codec.eos_token_ids) == ""  # special, though the file gives no kinds


@pytest.mark.parametrize("name", ["<|call|>", "<|eom_id|>"])
def test_the_end_of_a_tool_call_is_an_end(name: str) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    codec = TextCodec(tokenizer)
    assert codec.encode(name)[0] in codec.eos_token_ids
    plain = byte_level()
    plain.add_tokens([name])
    assert len(TextCodec(plain).eos_token_ids) == 2


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (5, None, (5,)),
        ([5, 6], None, (5, 6)),
        (5, {"eos_token_id": 7}, (7,)),
        (5, {"eos_token_id": [7, 8, 7]}, (7, 8)),
        (5, {"temperature": 1.0}, (5,)),
        (None, None, ()),
        (10**6, None, ()),
    ],
)
def test_a_models_own_end_tokens(
    tmp_path: Path, config: Any, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    """generation_config.json first, then config.json; ids that the model has no row for are no
    ends."""
    save(tiny_model("llama"), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": config}))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert open_model(str(tmp_path)).eos_token_ids == expected
