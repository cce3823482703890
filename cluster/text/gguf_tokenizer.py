"""The tokenizer that the metadata of a GGUF file describes, built again.

A GGUF file holds the vocabulary with scores or merges, the kind of each token, and names for the
rest. What is built equals the tokenizer.json that the file was made from, as far as the file tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import Metaspace

from cluster.text.bare import BareTokenizer
from cluster.text.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_of
from shards.errors import CheckpointError, UnsupportedModel

_REMEDY = "give the folder of the model's tokenizer.json with --tokenizer"
_SPACE = "\u2581"  # how SentencePiece writes a space
_TEMPLATE = "tokenizer.chat_template"
_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "eot_token": "eot",
    "eom_token": "eom",
    "unk_token": "unknown",
    "pad_token": "padding",
}
# Which end or begin a text, whatever kind the file says they are of.
_ALWAYS_SPECIAL = ("bos_token", "eos_token", "eot_token", "eom_token")


def build_tokenizer(metadata: Mapping[str, Any]) -> BareTokenizer | None:
    """The tokenizer of a file's metadata (`tokenizer.*` and `general.architecture`); None where
    there is none.

    Raises `UnsupportedModel` for a kind or a pre-tokenizer that is not known, `CheckpointError`
    where the parts do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab") or "tokenizer.ggml.tokens" not in metadata:
        return None
    vocabulary = _Vocabulary.of(metadata)
    if kind == "gpt2":
        tokenizer, begins = _byte_level(vocabulary, metadata)
    elif kind == "llama":
        tokenizer, begins = _sentencepiece(vocabulary, metadata), True
    else:
        raise UnsupportedModel(
            f"tokenizer.ggml.model is {kind!r}: gpt2 (byte-level BPE) and llama (SentencePiece "
            f"BPE) are known; {_REMEDY}"
        )
    tokenizer.add_tokens(list(vocabulary.added(rstrip=_strips_behind(kind, metadata))))
    _frame(tokenizer, vocabulary, metadata, begins)
    return BareTokenizer(tokenizer, vocabulary.roles, _templates(metadata))


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens by id, the kind of each, and the text of those that have a role."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    roles: Mapping[str, str]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> _Vocabulary:
        tokens: list[str] = list(metadata["tokenizer.ggml.tokens"])
        kinds = list(metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens))
        if len(kinds) != len(tokens):
            raise CheckpointError(
                f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens: "
                "convert the model again"
            )
        if metadata["tokenizer.ggml.model"] == "llama":
            # Converters write SentencePiece's own tokens of nothing but spaces with real ones.
            tokens = [
                token.replace(" ", _SPACE)
                if kind == TokenType.USER_DEFINED and not token.strip(" ")
                else token
                for token, kind in zip(tokens, kinds, strict=True)
            ]
        roles: dict[str, str] = {}
        for role, key in _ROLES.items():
            token = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if token is None:
                continue
            if not 0 <= token < len(tokens):
                raise CheckpointError(
                    f"tokenizer.ggml.{key}_token_id is {token}: the vocabulary has {len(tokens)} "
                    "tokens; convert the model again"
                )
            roles[role] = tokens[token]
        # What fills a vocabulary up to the rows of the model spells nothing.
        while kinds and kinds[-1] == TokenType.UNUSED and tokens[-1] not in roles.values():
            tokens.pop()
            kinds.pop()
        return cls(tokens, kinds, roles)

    @property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def added(self, rstrip: frozenset[str]) -> Iterator[AddedToken]:
        """The tokens that are found in a text before it is cut: special ones and the vocabulary's
        own (`<think>`). A special one in `rstrip` takes the white space behind it along."""
        always = {self.roles[role] for role in _ALWAYS_SPECIAL if role in self.roles}
        for token, kind in zip(self.tokens, self.kinds, strict=True):
            special = kind in (TokenType.CONTROL, TokenType.UNKNOWN) or token in always
            if token and (special or kind == TokenType.USER_DEFINED):
                yield AddedToken(
                    token, special=special, normalized=False, rstrip=special and token in rstrip
                )


def _byte_level(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """GPT-2's kind, and whether its texts begin with the begin token."""
    pre = metadata.get("tokenizer.ggml.pre")
    try:
        rule = pre_tokenizer_of(pre, metadata.get("general.architecture", ""))
    except KeyError:
        raise UnsupportedModel(
            f"tokenizer.ggml.pre is {pre!r}: known are {', '.join(PRE_TOKENIZERS)}; {_REMEDY}"
        ) from None
    ids = vocabulary.ids
    merges = [_merge(line, ids) for line in metadata.get("tokenizer.ggml.merges") or ()]
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=rule.whole_words))
    rule.install(tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.begins


def _merge(line: str, ids: Mapping[str, int]) -> tuple[str, str]:
    left, _, right = line.partition(" ")
    if left not in ids or right not in ids or left + right not in ids:
        raise CheckpointError(
            f"tokenizer.ggml.merges joins {line!r}, which is not in the vocabulary: convert the "
            "model again"
        )
    return left, right


def _sentencepiece(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> Tokenizer:
    """Llama 2's kind: BPE by scores over a whole text, bytes for what has no token."""
    tokens, ids = vocabulary.tokens, vocabulary.ids
    unknown = vocabulary.roles.get("unk_token")
    if unknown is None and TokenType.UNKNOWN in vocabulary.kinds:
        unknown = tokens[vocabulary.kinds.index(TokenType.UNKNOWN)]
    tokenizer = Tokenizer(
        models.BPE(
            ids,
            _merges_by_score(tokens, vocabulary.kinds, metadata),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in vocabulary.kinds,
        )
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = normalizers.Replace(" ", _SPACE)
    if not metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = spaces
    else:
        steps.append(decoders.Strip(" ", 1, 0))
        if "[TOOL_CALLS]" in ids:
            # Mistral's third vocabulary: a space before the text, none behind a special token.
            tokenizer.pre_tokenizer = Metaspace(_SPACE, prepend_scheme="first", split=False)
        else:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(
    tokens: Sequence[str], kinds: Sequence[int], metadata: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best token first: SentencePiece joins whatever
    gives the token of the highest score."""
    from transformers.tokenization_utils_base import generate_merges

    scores = metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens: convert "
            "the model again"
        )
    if metadata.get("general.architecture", "").startswith("gemma"):
        # Its scores are not in the order of its merges; its ids are.
        scores = [-float(i) for i in range(len(tokens))]
    best = max(scores)
    ranked: dict[str, float] = {}
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == TokenType.NORMAL:
            ranked[token] = scores[i]
        elif kind == TokenType.USER_DEFINED:  # found before anything is joined; shorter ones first
            ranked[token] = best + len(tokens) - i
    joinable = {token: i for i, token in enumerate(tokens) if token in ranked}
    merges: list[tuple[str, str]] = generate_merges(joinable, ranked)
    return merges


def _strips_behind(kind: str, metadata: Mapping[str, Any]) -> frozenset[str]:
    """Phi-3's special tokens take the white space behind them along, but for three; the file does
    not say so."""
    if kind != "llama" or metadata.get("general.architecture") != "phi3":
        return frozenset()
    return frozenset(metadata["tokenizer.ggml.tokens"]) - {"<unk>", "<s>", "<|endoftext|>"}


def _frame(
    tokenizer: Tokenizer, vocabulary: _Vocabulary, metadata: Mapping[str, Any], begins: bool
) -> None:
    """The tokens that an encoded text begins and ends with."""
    before, behind = vocabulary.roles.get("bos_token"), vocabulary.roles.get("eos_token")
    if not metadata.get("tokenizer.ggml.add_bos_token", begins):
        before = None
    if not metadata.get("tokenizer.ggml.add_eos_token", False):
        behind = None
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*([before] if before else []), "$A", *([behind] if behind else [])],
        special_tokens=[
            (token, tokenizer.token_to_id(token)) for token in (before, behind) if token
        ],
    )


def _templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """`tokenizer.chat_template` is the default; others have their names behind it."""
    default = metadata.get(_TEMPLATE)
    named = {
        key.removeprefix(f"{_TEMPLATE}."): text
        for key, text in metadata.items()
        if key.startswith(f"{_TEMPLATE}.") and isinstance(text, str)
    }
    if not named:
        return default
    return named if default is None else {"default": default, **named}
