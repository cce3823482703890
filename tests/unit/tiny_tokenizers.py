"""Tokenizers of every kind that matters, small enough to build in a test."""

from __future__ import annotations

from pathlib import Path

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import TokenizersBackend

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# What tends to break tokenizers and decoders.
TRICKY = (
    "",
    " ",
    "   three spaces",
    "trailing space ",
    "a\n\n\tb\r\nc",
    "it's 2026-11-22, 3.14159e-10!",
    "naïve café ÅÄÖ ß",
    "e\u0301 and \u00e9",
    "中文字符 日本語 한국어",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "שלום العربية",
    "\u200b\u200d\ufeff\u00a0",
    "\ufffd a real replacement character",
    "▁ metaspace in the text ▁▁",
    "<|end|> <s> </s> <unk> <|im_end|>",
    "<0x41><0xE2>",
    "def f(x):\n    return x  # done\n",
    "\x00\x01\x7f",
    "x" * 300,
)


def byte_level() -> TokenizersBackend:
    """GPT-2's kind: every byte a token, some merges, special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ã", "©"), ("l", "l"), ("â", "Ĥ")]
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|user|>", "<|assistant|>", END, "<|endoftext|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return TokenizersBackend(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def metaspace() -> TokenizersBackend:
    """SentencePiece's kind without byte fallback: the first space of a text is dropped."""
    pieces = ["<unk>", "</s>", "▁", *"abcdehlortw,.", "▁a", "▁the", "▁hello", "▁▁", "er"]
    merges = [("▁", "a"), ("▁", "▁"), ("e", "r")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return TokenizersBackend(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback() -> TokenizersBackend:
    """Llama 2's kind: unknown characters become byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdehlortw", "▁hello", "▁a", "▁▁"]
    merges = [("▁", "a"), ("▁", "▁")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(special)
    return TokenizersBackend(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _gguf(file: Path) -> gguf.GGUFWriter:
    """A Llama without tensors, as far as `transformers` needs it to name a tokenizer class."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf_byte_level(file: Path, pre: str = "default") -> None:
    """A byte-level vocabulary with a chat template; its end token is that of a document."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġt", "Ġthe"]
    special = ["<|user|>", "<|assistant|>", END, "<|endoftext|>"]
    writer = _gguf(file)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*pieces, *special])
    types = [gguf.TokenType.NORMAL] * len(pieces) + [gguf.TokenType.CONTROL] * len(special)
    writer.add_token_types(types)
    writer.add_token_merges(["h e", "Ġ t", "Ġt he"])
    writer.add_eos_token_id(len(pieces) + 3)
    writer.add_chat_template(CHAT_TEMPLATE)
    _finish(writer)


def write_gguf_sentencepiece(file: Path) -> None:
    """A SentencePiece vocabulary with byte fallback that begins every text with <s>."""
    control = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", *"abcdehlortw", "he", "▁t", "▁the", "▁a", "▁▁"]
    writer = _gguf(file)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*control, *octets, *words])
    writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(words))])
    writer.add_token_types(
        [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
        + [gguf.TokenType.BYTE] * 256
        + [gguf.TokenType.NORMAL] * len(words)
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    _finish(writer)


def write_gguf_without_tokenizer(file: Path) -> None:
    _finish(_gguf(file))
