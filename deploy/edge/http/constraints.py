"""What the fields for structured output ask of the text, in a language of `cluster.request`."""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.errors import InvalidRequest, Violation
from cluster.request import Constraint, Language
from deploy.edge.http.fields import GenerationBody, ResponseFormat


def json_constraint(schema: str | dict[str, Any] | bool) -> Constraint:
    """Text that is JSON of a schema, which is given parsed or as JSON."""
    source = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return Constraint(Language.JSON_SCHEMA, (source,))


def asked_constraint(body: GenerationBody) -> tuple[str, Constraint] | None:
    """The constraint and the field that asks for it; raises `InvalidRequest` for several."""
    found: dict[str, Constraint] = {}
    if body.response_format is not None and body.response_format.type != "text":
        found["response_format"] = json_constraint(_schema(body.response_format))
    given: dict[str, Any] = {
        "guided_json": body.guided_json,
        "guided_regex": body.guided_regex,
        "guided_choice": body.guided_choice,
        "guided_grammar": body.guided_grammar,
    }
    outputs = body.structured_outputs
    if outputs is not None:
        given |= {
            "structured_outputs.json": outputs.schema_,
            "structured_outputs.regex": outputs.regex,
            "structured_outputs.choice": outputs.choice,
            "structured_outputs.grammar": outputs.grammar,
        }
        if outputs.json_object:
            given["structured_outputs.json_object"] = {"type": "object"}
    for field, value in given.items():
        if value is not None:
            found[field] = _constraint(field.rpartition(".")[2].removeprefix("guided_"), value)
    if len(found) > 1:
        fields = ", ".join(found)
        raise InvalidRequest(
            Violation(list(found)[1], f"a text is of one form and {fields} ask for one: keep one")
        )
    if not found:
        if outputs is not None:
            raise InvalidRequest(
                Violation(
                    "structured_outputs",
                    "it says nothing: set json, json_object, regex, choice or grammar",
                )
            )
        return None
    return next(iter(found.items()))


def _constraint(kind: str, value: Any) -> Constraint:
    if kind == "regex":
        return Constraint(Language.REGEX, (value,))
    if kind == "choice":
        return Constraint(Language.CHOICES, tuple(value))
    if kind == "grammar":
        return Constraint(Language.LARK, (value,))
    return json_constraint(value)


def _schema(asked: ResponseFormat) -> dict[str, Any] | bool:
    if asked.type == "json_object":
        return {"type": "object"}
    if asked.json_schema is None or asked.json_schema.definition is None:
        raise InvalidRequest(
            Violation("response_format.json_schema.schema", "missing: give the JSON schema")
        )
    return asked.json_schema.definition
