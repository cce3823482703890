"""A GGUF's tokenizer gives the ids of the tokenizer that the file was made from, family by family.

The references cut text as the models' own tokenizer.json files do: spelled out here, or taken from
`transformers`. SentencePiece's are held to the sentencepiece library itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from cluster.text import TextCodec
from cluster.text.gguf_tokenizer import build_tokenizer
from shards.errors import CheckpointError, UnsupportedModel
from tests.unit.gguf_tokenizers import (
    CORPUS,
    NASTY,
    OWN,
    SPECIAL,
    train_byte_level,
    train_sentencepiece,
    write_byte_level,
    write_sentencepiece,
)

texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=sorted(set("".join(NASTY + tuple(CORPUS)))), max_size=60),
    st.lists(st.sampled_from([*SPECIAL, *OWN, " ", "a", "1", "\n", "'s"]), max_size=8).map("".join),
)
many = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def published(*steps: dict[str, object]) -> pre_tokenizers.PreTokenizer:
    """The pre_tokenizer of a tokenizer.json."""
    content = json.loads(Tokenizer(models.BPE()).to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)}
    return Tokenizer.from_str(json.dumps(content)).pre_tokenizer


def split(pattern: str) -> dict[str, object]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def byte_level(*, use_regex: bool) -> dict[str, object]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


DIGITS = {"type": "Digits", "individual_digits": True}
GPT2 = published(byte_level(use_regex=True))
SMOLLM = published(DIGITS, byte_level(use_regex=True))
FALCON = published(
    {"type": "Punctuation", "behavior": "Contiguous"},
    byte_level(use_regex=True),
    {"type": "Digits", "individual_digits": False},
    split("[0-9][0-9][0-9]"),
)
BLOOM = published(
    split(" ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"),
    byte_level(use_regex=False),
)
CJK = split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
DEEPSEEK_CODER = published(
    split("[\r\n]"),
    split(r"\s?\p{L}+"),
    split(r"\s?\p{P}+"),
    CJK,
    DIGITS,
    byte_level(use_regex=False),
)
DEEPSEEK_V3 = published(
    split(r"\p{N}{1,3}"),
    split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
    split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+"
        "|\\s+(?!\\S)|\\s+"
    ),
    byte_level(use_regex=False),
)


def of_transformers(name: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA3, QWEN2 = of_transformers("llama-bpe"), of_transformers("qwen2")
# name: how its words are cut, and whether text is composed (NFC) first.
BYTE_LEVEL = {
    "gpt-2": (GPT2, False),
    "phi-2": (GPT2, False),
    "mpt": (GPT2, True),
    "olmo": (GPT2, True),
    "smollm": (SMOLLM, False),
    "starcoder": (SMOLLM, False),
    "refact": (SMOLLM, False),
    "command-r": (SMOLLM, True),
    "falcon": (FALCON, False),
    "bloom": (BLOOM, False),
    "llama-bpe": (LLAMA3, False),
    "llama3": (LLAMA3, False),
    "falcon3": (LLAMA3, False),
    "dbrx": (LLAMA3, False),
    "glm4": (LLAMA3, False),
    "chatglm-bpe": (LLAMA3, False),
    "qwen2": (QWEN2, True),
    "stablelm2": (QWEN2, True),
    "qwen35": (of_transformers("qwen35"), True),
    "tekken": (of_transformers("tekken"), False),
    "gpt-4o": (of_transformers("gpt-4o"), False),
    "deepseek-coder": (DEEPSEEK_CODER, False),
    "deepseek-v3": (DEEPSEEK_V3, False),
}
WHOLE_WORDS = ("llama-bpe", "llama3", "falcon3", "tekken")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def load(file: Path) -> TextCodec:
    codec = TextCodec.load(str(file.parent), gguf=file.name)
    assert codec is not None
    return codec


def made(folder: Path, pre: str) -> tuple[Tokenizer, TextCodec]:
    words, compose = BYTE_LEVEL[pre]
    reference = train_byte_level(words, whole_words=pre in WHOLE_WORDS, compose=compose)
    write_byte_level(reference, folder / "model.gguf", pre=pre)
    return reference, load(folder / "model.gguf")


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_equals_the_tokenizer_it_was_made_from(tmp_path: Path, pre: str) -> None:
    reference, codec = made(tmp_path, pre)
    assert codec.size == reference.get_vocab_size()

    def check(text: str) -> None:
        ids = reference.encode(text).ids
        assert codec.encode(text) == ids
        for skip in (True, False):
            assert codec.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)

    for text in (*NASTY, *CORPUS):
        check(text)
    many(given(texts)(check))()


def test_deepseek_llm_parts_words_digits_punctuation_and_ideographs(tmp_path: Path) -> None:
    write_byte_level(train_byte_level(GPT2), tmp_path / "model.gguf", pre="deepseek-llm")
    steps = json.loads(load(tmp_path / "model.gguf").tokenizer_json)["pre_tokenizer"]
    cut = published(*steps["pretokenizers"])
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = ["ab", " \u0416\u03a9", "\u4e2d\u6587", " ", "1", "2", ",", " (", "x", "\n", "\r", "  "]
    pieces = [piece for piece, _ in cut.pre_tokenize_str("".join(words))]
    assert pieces == [shown.pre_tokenize_str(word)[0][0] for word in words]


def test_an_unknown_pre_tokenizer_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    write_byte_level(train_byte_level(GPT2), tmp_path / "model.gguf", pre="klingon-bpe")
    with pytest.raises(UnsupportedModel, match=r"klingon-bpe.*llama-bpe.*qwen2.*--tokenizer"):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("pre", "architecture", "words", "compose"),
    [
        (None, "qwen2", QWEN2, True),
        ("default", "gptneox", GPT2, True),
        ("default", "falcon", FALCON, False),
        ("default", "llama", GPT2, False),
    ],
)
def test_a_file_without_a_name_is_cut_as_its_architecture_is(
    tmp_path: Path,
    pre: str | None,
    architecture: str,
    words: pre_tokenizers.PreTokenizer,
    compose: bool,
) -> None:
    reference = train_byte_level(words, compose=compose)
    write_byte_level(reference, tmp_path / "model.gguf", pre=pre, architecture=architecture)
    codec = load(tmp_path / "model.gguf")
    for text in NASTY:
        assert codec.encode(text) == reference.encode(text).ids


def test_special_tokens_are_found_skipped_and_end_answers(tmp_path: Path) -> None:
    reference, codec = made(tmp_path, "deepseek-v3")
    ids = codec.encode("".join(SPECIAL) + "<think>")
    assert ids == [reference.token_to_id(token) for token in [*SPECIAL, "<think>"]]
    assert codec.decode(ids) == "<think>"
    assert codec.eos_token_ids == (reference.token_to_id(SPECIAL[1]),)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_sentencepiece_equals_sentencepiece(tmp_path: Path, architecture: str) -> None:
    model = train_sentencepiece(prefix=True)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    write_sentencepiece(model, tmp_path / "model.gguf", architecture=architecture, prefix=True)
    codec = load(tmp_path / "model.gguf")

    def check(text: str) -> None:
        ids = reference.encode(text)
        assert codec.encode(text) == [1, *ids]
        assert codec.decode(ids) == reference.decode(ids)

    plain = texts.filter(lambda text: "<" not in text and "\x00" not in text)
    for text in (*NASTY, *CORPUS):
        if "<s>" not in text and "\x00" not in text:
            check(text)
    many(given(plain)(check))()


def test_gemma_equals_its_fast_tokenizer(tmp_path: Path) -> None:
    """No space before a text; runs of spaces and line ends are tokens of the vocabulary's own."""
    from transformers import GemmaTokenizer

    own = [
        "\u2581\u2581",
        "\u2581\u2581\u2581",
        "\u2581\u2581\u2581\u2581",
        "\n",
        "\n\n",
        "<table>",
    ]
    model = train_sentencepiece(prefix=False, own=own)
    write_sentencepiece(model, tmp_path / "model.gguf", architecture="gemma2", prefix=False)
    codec = load(tmp_path / "model.gguf")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    reference = GemmaTokenizer(
        vocab=vocabulary,
        merges=_merges_in_order(pieces),
        bos_token="<s>",
        eos_token="</s>",
        pad_token=None,
        mask_token=None,
    )
    reference.add_tokens([AddedToken(token, normalized=False) for token in own])

    def check(text: str) -> None:
        ids = reference.encode(text, add_special_tokens=False)
        assert codec.encode(text, add_special_tokens=False) == ids
        assert codec.decode(ids, False) == reference.decode(ids)

    for text in (*NASTY, *CORPUS):
        check(text)
    many(given(texts)(check))()


def _merges_in_order(
    pieces: sentencepiece.SentencePieceProcessor,
) -> list[tuple[str, str]]:
    """As in Gemma's tokenizer.json: earlier tokens first."""
    normal = [
        pieces.id_to_piece(i)
        for i in range(pieces.get_piece_size())
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
    ]
    known = set(normal)
    return [
        (token[:cut], token[cut:])
        for token in normal
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in known and token[cut:] in known
    ]


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("tokenizer.ggml.model", "rwkv", "rwkv.*--tokenizer"),
        ("tokenizer.ggml.bos_token_id", 10**6, "bos_token_id is 1000000"),
        ("tokenizer.ggml.token_type", [1], "token_type has 1 entries"),
        ("tokenizer.ggml.merges", ["zz qq"], "zz qq"),
    ],
)
def test_parts_that_do_not_fit_are_named(key: str, value: object, complaint: str) -> None:
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    assert build_tokenizer(metadata) is not None
    with pytest.raises((CheckpointError, UnsupportedModel), match=complaint):
        build_tokenizer(metadata | {key: value})


def sentencepiece_metadata(**changes: object) -> dict[str, object]:
    tokens = ["<unk>", "<s>", "</s>", "[TOOL_CALLS]", "\u2581", "a", "b", "\u2581a", "\u2581b"]
    control = gguf.TokenType.CONTROL
    kinds = [gguf.TokenType.UNKNOWN, control, control, control]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": kinds + [gguf.TokenType.NORMAL] * 5,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def without_tool_calls(**changes: object) -> dict[str, object]:
    metadata = sentencepiece_metadata(**changes)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    return metadata | {"tokenizer.ggml.tokens": [*tokens[:3], "<|user|>", *tokens[4:]]}


@pytest.mark.parametrize(
    ("metadata", "text", "ids"),
    [
        # Texts begin with <s> unless the file says otherwise, and end without </s>.
        (without_tool_calls(), "a", [1, 7]),
        (without_tool_calls(add_bos_token=False), "a", [7]),
        (without_tool_calls(add_eos_token=True), "a", [1, 7, 2]),
        # Every piece of text between special tokens begins with a space, as llama.cpp has it.
        (without_tool_calls(), "a</s>b", [1, 7, 2, 8]),
        (without_tool_calls(), "a</s> b", [1, 7, 2, 4, 8]),
        (without_tool_calls(add_space_prefix=False), "a</s>b", [1, 5, 2, 6]),
        # Mistral's third vocabulary: only the text as a whole.
        (sentencepiece_metadata(), "a</s>b", [1, 7, 2, 6]),
        (sentencepiece_metadata(), "a</s> b", [1, 7, 2, 8]),
        # Phi-3: the white space behind a special token belongs to it, but for <s>.
        (without_tool_calls() | {"general.architecture": "phi3"}, "<|user|> \n b", [1, 3, 8]),
        (without_tool_calls() | {"general.architecture": "phi3"}, "<s> b", [1, 1, 4, 8]),
        # Without byte tokens, what has no token is the unknown one.
        (without_tool_calls(), "a\u4e2d\u6587", [1, 7, 0]),
    ],
)
def test_sentencepiece_frames_and_spaces(
    metadata: dict[str, object], text: str, ids: list[int]
) -> None:
    tokenizer = build_tokenizer(metadata)
    assert tokenizer is not None
    assert TextCodec(tokenizer).encode(text) == ids


def test_llama3_and_tekken_begin_texts_where_the_file_does_not_say() -> None:
    for pre, begins in (("llama-bpe", True), ("tekken", True), ("qwen2", False)):
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": ["<begin>", "a"],
            "tokenizer.ggml.bos_token_id": 0,
        }
        for stated in ({}, {"tokenizer.ggml.add_bos_token": not begins}):
            tokenizer = build_tokenizer(metadata | stated)
            assert tokenizer is not None
            expected = [0, 1] if begins is not bool(stated) else [1]
            assert TextCodec(tokenizer).encode("a") == expected
