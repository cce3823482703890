r"""How byte-level vocabularies cut text into words: one way for each `tokenizer.ggml.pre`.

A GGUF file has a vocabulary's merges but only a name for the rule that its words were cut with; the
rule itself is in the tokenizer.json of the model it was made from. The patterns here are those that
the models published there (named beside each), as the `tokenizers` library runs them, not the
rewritten ones of other engines: the ids are the model's own. Which names share a rule is
llama.cpp's `llama_vocab::impl::load`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# OpenAI's cl100k_base: Llama 3, DBRX, GLM-4.
_CL100K = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
)
# Qwen 2 and StableLM 2: cl100k_base with every digit alone.
_QWEN2 = _CL100K.replace("{1,3}", "")
# Qwen 3.5: letters with the marks on them.
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Mistral NeMo (Tekken): words change at a change of case.
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
)
# OpenAI's o200k_base: GPT-OSS.
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
)
# BLOOM: words with the space before them; punctuation of several scripts stands alone.
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
# Seed-Coder.
_SEED_CODER = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_ENDS}"
)
# Tiny Aya: digits in threes from the right, then o200k_base.
_THREES = r"\d{1,3}(?=(?:\d{3})*\b)"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK)
# DeepSeek LLM spells out the letters that have a case.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDS}",
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """`patterns` cut one after the other; none: GPT-2's own pattern cuts, last. `digits` first (or
    after the patterns, if there are some) makes every digit a word. Falcon's way is its own.

    `compose`: text is brought into Unicode's form NFC first. `whole_words`: a word that is in the
    vocabulary is that token, whatever the merges say. `begins`: texts begin with the begin token
    where the file does not say.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    falcon: bool = False
    compose: bool = False
    whole_words: bool = False
    begins: bool = False

    def install(self, tokenizer: Tokenizer) -> None:
        """Make a byte-level tokenizer cut text this way."""
        if self.compose:
            tokenizer.normalizer = normalizers.NFC()
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns
        ]
        if self.falcon:
            steps.append(pre_tokenizers.Punctuation("contiguous"))
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns))
        if self.falcon:
            steps.append(pre_tokenizers.Digits(individual_digits=False))
            steps.append(pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(digits=True)
_LLAMA3 = PreTokenizer((_CL100K,), whole_words=True, begins=True)
_QWEN = PreTokenizer((_QWEN2,), compose=True)
_GPT4O = PreTokenizer((_O200K,))
_NEOX = PreTokenizer(compose=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "bloom": PreTokenizer((_BLOOM,)),
    "chatglm-bpe": PreTokenizer((_CL100K,)),
    "codeshell": _DIGITS,
    "command-r": PreTokenizer(digits=True, compose=True),
    "dbrx": PreTokenizer((_CL100K,)),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER, digits=True),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM, digits=True),
    "deepseek-r1-qwen": _QWEN,
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),
    "falcon": PreTokenizer(falcon=True),
    "falcon3": _LLAMA3,
    "glm4": PreTokenizer((_CL100K,)),
    "gpt-2": _GPT2,
    "gpt-4o": _GPT4O,
    "gpt3-finnish": PreTokenizer((_BLOOM,)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "llama4": _GPT4O,
    "megrez": _QWEN,
    "midm-2.0": _LLAMA3,
    "minerva-7b": _DIGITS,
    "mpt": _NEOX,
    "olmo": _NEOX,
    "phi-2": _GPT2,
    "pixtral": _LLAMA3,
    "poro-chat": PreTokenizer((_BLOOM,)),
    "qwen2": _QWEN,
    "qwen35": PreTokenizer((_QWEN35,), compose=True),
    "refact": _DIGITS,
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "smaug-bpe": PreTokenizer((_CL100K,)),
    "smollm": _DIGITS,
    "stablelm2": PreTokenizer((_QWEN2,), compose=True),
    "starcoder": _DIGITS,
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, begins=True),
    "tiny_aya": PreTokenizer((_THREES, _O200K)),
}

# Files from before the name was written, and those that say "default": what the architecture's
# models use where that is one rule; GPT-2's pattern for the others, as `transformers` does.
_OF_ARCHITECTURE = {
    "bloom": "bloom",
    "chatglm": "chatglm-bpe",
    "command-r": "command-r",
    "falcon": "falcon",
    "glm4": "glm4",
    "gpt-oss": "gpt-4o",
    "gpt2": "gpt-2",
    "gptneox": "olmo",
    "granite": "refact",
    "mpt": "mpt",
    "olmo": "olmo",
    "phi2": "phi-2",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2",
    "qwen3": "qwen2",
    "qwen3moe": "qwen2",
    "starcoder": "starcoder",
    "starcoder2": "starcoder",
}


def pre_tokenizer_of(pre: str | None, architecture: str) -> PreTokenizer:
    """The rule that a file's `tokenizer.ggml.pre` and `general.architecture` name.

    Raises `KeyError` for a name that is not known.
    """
    if pre in (None, "", "default"):
        return PRE_TOKENIZERS[_OF_ARCHITECTURE.get(architecture, "gpt-2")]
    return PRE_TOKENIZERS[pre]
