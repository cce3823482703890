"""Reading a config.json with the defaults of its family, and a clear error for a wrong value."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.spec import Activation

# transformers' names; its three tanh variants differ in rounding only.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_DTYPES = ("float32", "float16", "bfloat16")

# Several times the largest of any model. A config that states more is damaged or hostile, and would
# keep a planner busy for minutes: dealing heads takes time by their square.
_MOST_LAYERS = 10_000
_MOST_HEADS = 4096
_MOST = 2**31 - 1


class Fields:
    """The fields of one config: what it states, else the family's default.

    A field that is null counts as unstated, but for those in `absent`: their defaults hold where
    the config does not have them, and null means none. `aliases` maps a field to another name under
    which configs may state it. Every getter raises `UnsupportedModel`, naming field and value.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
        absent: Mapping[str, Any] | None = None,
    ) -> None:
        missing = {name: value for name, value in (absent or {}).items() if name not in config}
        self._config = config
        self._defaults = {**defaults, **missing}
        self._aliases = aliases or {}

    def get(self, name: str) -> Any:
        """The raw value; None where neither config nor family has one."""
        for spelling in (name, self._aliases.get(name, name)):
            if self._config.get(spelling) is not None:
                return self._config[spelling]
        return self._defaults.get(name)

    def integer(self, name: str, most: int = _MOST, *, least: int = 1) -> int:
        """A whole number from `least` to `most`."""
        value = self.get(name)
        if type(value) is not int or value < least:
            raise _refuse(name, value, f"a whole number above {least - 1} is needed")
        if value > most:
            raise _refuse(name, value, f"at most {most:,} is supported")
        return value

    def layers(self, name: str) -> int:
        """How many layers there are."""
        return self.integer(name, _MOST_LAYERS)

    def heads(self, name: str) -> int:
        """How many heads a layer has."""
        return self.integer(name, _MOST_HEADS)

    def number(self, name: str) -> float:
        """A finite number above 0."""
        return positive(name, self.get(name))

    def number_or_none(self, name: str) -> float | None:
        """The same, or None where there is none."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise _refuse(name, value, "true or false is needed")
        return value

    def choice(self, name: str, known: Sequence[str]) -> str:
        """One of the words that are `known`."""
        value = self.get(name)
        if value not in known:
            raise _refuse(name, value, f"known are {', '.join(known)}")
        return str(value)

    def activation(self, name: str) -> Activation:
        value = self.get(name)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise _refuse(name, value, f"known are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def dtype(self) -> str:
        """The checkpoint's dtype, under transformers' new or old field name."""
        value = self._config.get("dtype") or self._config.get("torch_dtype") or "float32"
        name = str(value).removeprefix("torch.")
        if name not in _DTYPES:
            raise _refuse("dtype", value, f"known are {', '.join(_DTYPES)}")
        return name

    def head_counts(self, heads: str, kv_heads: str) -> tuple[int, int]:
        """Query and KV heads; the latter default to the former and must divide them."""
        count = self.heads(heads)
        kv_count = self.heads(kv_heads) if self.get(kv_heads) is not None else count
        if count % kv_count:
            raise UnsupportedModel(
                f"config fields {heads}={count} and {kv_heads}={kv_count}: "
                "the KV heads must divide the query heads"
            )
        return count, kv_count

    def window(self, name: str, context: int) -> int | None:
        """A sliding window; None where there is none, or it holds the whole `context`."""
        if self.get(name) is None or self.integer(name) >= context:
            return None
        return self.integer(name)

    def even_share(self, width: str, heads: str) -> int:
        """`width` / `heads`, the head_dim of families that state none."""
        total, count = self.integer(width), self.heads(heads)
        if total % count:
            raise UnsupportedModel(
                f"config fields {width}={total} and {heads}={count}: the heads must divide it"
            )
        return total // count

    def head_dim(self, width: str, heads: str) -> int:
        """The stated `head_dim`, else an even share of the width."""
        if self.get("head_dim") is not None:
            return self.integer("head_dim")
        return self.even_share(width, heads)

    def sliding_layers(self, default: Callable[[int], bool]) -> list[bool]:
        """Whether each layer has a sliding window: as `layer_types` says, else `default`(i)."""
        layers = self.layers("num_hidden_layers")
        kinds = self.get("layer_types")
        if kinds is None:
            return [default(i) for i in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise _refuse(
                "layer_types",
                kinds,
                f"one entry for each of the num_hidden_layers={layers} is needed",
            )
        for kind in kinds:
            if kind not in ("sliding_attention", "full_attention"):
                raise _refuse("layer_types", kind, "known are sliding_attention and full_attention")
        return [kind == "sliding_attention" for kind in kinds]

    def refuse_flag(self, name: str, why: str) -> None:
        """Raise where `name` is true: an option that the decoder has no part for."""
        if self.get(name):
            raise _refuse(name, self.get(name), why)


def positive(name: str, value: Any) -> float:
    """`value` as a float above 0, or `UnsupportedModel` naming the field."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: a whole number may be too large for a float.
    if not number or not 0 < value <= sys.float_info.max:
        raise _refuse(name, value, "a number above 0 is needed")
    return float(value)


def _refuse(name: str, value: Any, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"config field {name} is {value!r:.80}: {why}")
