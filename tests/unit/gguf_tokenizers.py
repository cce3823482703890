"""Tiny trained tokenizers of every kind that a GGUF file may hold, and the files llama.cpp's
converter makes of them."""

# ruff: noqa: E501

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what they've said; we'll see, I'd say.",
    "def f(x):\n    return x + 1\n\n\n\tif x == 1000000:\r\n        print('hello, world!')\n",
    "In 2026 there were 1234567 tokens, 3.14159 of them \u00bd, \u00b2 and \u00be; 12,345.67 in 99 files.",
    "\u4e2d\u6587\u5b57\u7b26\uff0c\u4f60\u597d\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \uae00\uc790",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0639\u0631\u0628\u064a\u0629\u060c \u0939\u093f\u0928\u094d\u0926\u0940\u0964 \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "na\u00efve caf\u00e9 \u00c5\u00c4\u00d6 \u00df e\u0301 CamelCase HTTPServer iPhone ALLCAPS don'T I'M",
    "    four spaces   three  two \u00a0 nbsp\u3000ideographic   \n  \n trailing   ",
    "!!! ??? ... --- === /* comment */ // path/to/file $100 + 50% <b>bold</b> a@b.c #tag",
] * 8
SPECIAL = ["<|begin|>", "<|end|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
OWN = ["<think>", "   "]
NASTY = (
    "",
    " ",
    "  ",
    "   x",
    "a  1",
    "  12 345 6789012",
    "x=1000000,y=\u00bd\u00b2\u0663\u0664\u2166",
    "it's I'M don'T we'LL he'd've 'tis",
    "a\n\n\n b\r\n\r\nc\t\td \n \n",
    "trailing \n",
    "end  ",
    "HTTPServer iPhone McDONALD \u01c5ungla",
    "\u4e2d\u6587abc\u4e2d\u65871\u3002\uff01\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\ud55c\uad6d\uc5b4",
    "e\u0301 \u00e9 A\u030a \u212b \u1e9b\u0323 \ufb01",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308\u200b\ufeff",
    "\u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0639\u0631\u0628\u064a\u0629\u060c \u06d4 \u0964 \u2026 \u3001",
    "<|begin|>hi<|end|> <|end|>x <think> a</think> <\uff5cend\u2581of\u2581sentence\uff5c>",
    "<s> </s> <unk> <0x41> [INST] <|im_end|>",
    "\u2581meta \u2581\u2581space\u2581",
    "!?...,;: $+<=>^~|` -- \u201cquoted\u201d \u2014",
    "\x00\x01\x7f\ufffd",
    "\u043c\u0438\u0440 999 a1b2c3",
)


def train_byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer, *, whole_words: bool = False, compose: bool = False
) -> Tokenizer:
    """A BPE whose words are those of `pre_tokenizer`, with special tokens and tokens of its own."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    if compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in OWN])
    return tokenizer


def write_byte_level(
    tokenizer: Tokenizer, file: Path, *, pre: str | None, architecture: str = "llama"
) -> None:
    added = tokenizer.get_added_tokens_decoder()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    tokens = [tokenizer.id_to_token(i) for i in range(size)]
    kinds = [
        gguf.TokenType.NORMAL
        if i not in added
        else gguf.TokenType.CONTROL
        if added[i].special
        else gguf.TokenType.USER_DEFINED
        for i in range(size)
    ]
    tokens += [f"[PAD{i}]" for i in range(size, size + 3)]
    kinds += [gguf.TokenType.UNUSED] * 3
    model = json.loads(tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.token_to_id(SPECIAL[0]))
    writer.add_eos_token_id(tokenizer.token_to_id(SPECIAL[1]))
    writer.add_add_bos_token(False)
    finish(writer)


def train_sentencepiece(*, prefix: bool, own: Sequence[str] = ()) -> bytes:
    """A SentencePiece BPE with byte fallback, as Llama 2's (`prefix`) and Gemma's are: its model
    file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        split_digits=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(own),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    return model.getvalue()


def write_sentencepiece(model: bytes, file: Path, *, architecture: str, prefix: bool) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens: list[str] = []
    kinds: list[int] = []
    for i in range(processor.get_piece_size()):
        token, kind = processor.id_to_piece(i), gguf.TokenType.NORMAL
        if processor.is_unknown(i):
            kind = gguf.TokenType.UNKNOWN
        elif processor.is_control(i):
            kind = gguf.TokenType.CONTROL
        elif processor.is_byte(i):
            kind = gguf.TokenType.BYTE
        elif processor.get_score(i) == 0.0 and i < 40:  # the symbols that it was given
            kind, token = gguf.TokenType.USER_DEFINED, token.replace("\u2581", " ")
        tokens.append(token)
        kinds.append(kind)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([processor.get_score(i) for i in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if not prefix:
        writer.add_add_space_prefix(False)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
