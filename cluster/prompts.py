"""What people hand to `Engine.generate`, made plain: lists, arrays, tensors, bare values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from cluster.errors import InvalidRequest, Violation
from cluster.request import Constraint, Language


def _refuse(field: str, value: object, wanted: str) -> InvalidRequest:
    return InvalidRequest(Violation(field, f"{type(value).__name__} {value!r:.60}: give {wanted}"))


def prompts_of(prompt: Any) -> tuple[list[str | tuple[int, ...]], bool]:
    """The prompts in `prompt`, and whether it was one alone rather than a list of them.

    A prompt is a str, or token ids in a list, tuple, array or tensor; bytes are neither. Raises
    `InvalidRequest`.
    """
    wanted = "text, token ids, or a list of either"
    if isinstance(prompt, str):
        return [prompt], True
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
        raise _refuse("prompt", prompt, wanted)
    items = list(prompt)
    if items and all(isinstance(item, Integral) for item in items):
        return [tuple(map(int, items))], True
    found: list[str | tuple[int, ...]] = []
    for item in items:
        if isinstance(item, Integral):
            raise _refuse("prompt", item, wanted)
        if not isinstance(item, str) and hasattr(item, "__len__") and len(item) == 0:
            found.append(())
            continue
        one, single = prompts_of(item)
        if not single:
            raise _refuse("prompt", item, wanted)
        found += one
    return found, False


def texts_of(field: str, value: Any) -> tuple[str, ...]:
    """One text, several, or None for none."""
    if value is None:
        return ()
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Iterable) or not all(isinstance(text, str) for text in texts):
        raise _refuse(field, value, "a text or a list of texts")
    return tuple(texts)


def ids_of(field: str, value: Any) -> tuple[int, ...]:
    """Token ids, or None for none."""
    if value is None:
        return ()
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Iterable) or not all(isinstance(token, Integral) for token in value):
        raise _refuse(field, value, "a list of token ids")
    return tuple(int(token) for token in value)


def bias_of(field: str, value: Any) -> dict[int, float]:
    """Token id -> bias, or None for none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        isinstance(token, Integral) and isinstance(bias, Real) for token, bias in value.items()
    ):
        raise _refuse(field, value, "a dict of token ids to numbers")
    return {int(token): float(bias) for token, bias in value.items()}


def constraint_of(*, json_schema: Any, regex: Any, lark: Any, choices: Any) -> Constraint | None:
    """The one that is not None. A schema is a dict, a bool, or JSON text."""
    if isinstance(json_schema, Mapping | bool):
        try:
            json_schema = json.dumps(json_schema)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                Violation("constraint.json_schema", f"it is not JSON ({error}): give what is")
            ) from None
    sources = {
        Language.JSON_SCHEMA: json_schema,
        Language.REGEX: regex,
        Language.LARK: lark,
        Language.CHOICES: choices,
    }
    given = {language: source for language, source in sources.items() if source is not None}
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequest(
            Violation("constraint", f"{' and '.join(given)} are given: choose one")
        )
    [(language, source)] = given.items()
    field = f"constraint.{language}"
    if language is Language.CHOICES:
        return Constraint(language, texts_of(field, source))
    if not isinstance(source, str):
        raise _refuse(field, source, "a text")
    return Constraint(language, (source,))
