"""Values into the fields of protobuf messages, and what is wrong with those that do not go in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import Message

from headwise.errors import InvalidRequestError, Violation
from headwise.v1.inference_pb2 import TokenIds

_LIMITS = {
    "uint32": (0, 2**32 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "uint64": (0, 2**64 - 1),
}


class Faults:
    """Values that no message can carry, gathered so that one error names them all."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def add(self, argument: str, description: str) -> None:
        self._violations.append(Violation(argument, description))

    def out_of_range(self, argument: str, value: object, kind: str = "uint32") -> None:
        low, high = _LIMITS[kind]
        self.add(argument, f"{value} is not in [{low}, {high}]")

    def check(self) -> None:
        """Raises InvalidRequestError if there are any."""
        if self._violations:
            message = "; ".join(f"{fault.field}: {fault.description}" for fault in self._violations)
            raise InvalidRequestError(message, violations=self._violations)


def set_field(
    message: Message, field: str, value: object, faults: Faults, argument: str | None = None
) -> None:
    """Raises TypeError naming `argument`, the field's own name by default."""
    argument = argument or field
    kind = message.DESCRIPTOR.fields_by_name[field]
    if kind.type == kind.TYPE_STRING and not isinstance(value, str):
        # protobuf would take bytes for text.
        raise TypeError(f"{argument} must be str, not {type_name(value)}")
    try:
        setattr(message, field, value)
    except TypeError:
        expected = {kind.TYPE_FLOAT: "float", kind.TYPE_BOOL: "bool"}.get(kind.type, "int")
        raise TypeError(f"{argument} must be {expected}, not {type_name(value)}") from None
    except UnicodeEncodeError as error:
        faults.add(argument, f"not valid Unicode: lone surrogate at {error.start}")
    except (ValueError, OverflowError):
        wire = {kind.TYPE_INT32: "int32", kind.TYPE_UINT64: "uint64"}.get(kind.type, "uint32")
        faults.out_of_range(argument, value, wire)


def set_given(message: Message, values: Mapping[str, object], faults: Faults) -> None:
    """Set the fields whose values are not None."""
    for field, value in values.items():
        if value is not None:
            set_field(message, field, value, faults)


def extend_ids(target: Any, ids: Iterable[int], argument: str, faults: Faults) -> None:
    """Append token ids. A long prompt is converted in one call, and looked at singly only if that
    fails."""
    ids = list(ids)
    try:
        target.extend(ids)
    except (TypeError, ValueError, OverflowError):
        for position, token in enumerate(ids):
            try:
                TokenIds(ids=[token])
            except TypeError:
                raise TypeError(
                    f"{argument}[{position}] must be a token id (int), not {type_name(token)}"
                ) from None
            except (ValueError, OverflowError):
                faults.out_of_range(f"{argument}[{position}]", token)


def check_sequence(value: object, argument: str, expected: str) -> None:
    """Raises TypeError for text, a mapping, and what cannot be iterated."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be {expected}, not {type_name(value)}")


def type_name(value: object) -> str:
    return type(value).__name__
