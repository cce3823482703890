"""Write docs/api.md from proto/headwise/v1 and its comments, or check that it is current.

python scripts/api_reference.py            write the page
python scripts/api_reference.py --check    exit 1 where it is not what the protos say
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
PAGE = ROOT / "docs" / "api.md"
PACKAGE = "headwise.v1"

HEAD = """\
# The gRPC API

Package `headwise.v1`, from [inference.proto](../proto/headwise/v1/inference.proto) and
[control.proto](../proto/headwise/v1/control.proto). This page is generated from them by
`scripts/api_reference.py`. From Python use [the SDK](sdk.md); for any other language generate
stubs from the protos, or ask a running server through reflection:

```
grpcurl -plaintext -d '{"text": "The capital of France is", "stopping": {"max_tokens": 8}}' \\
    127.0.0.1:50051 headwise.v1.Inference/Generate
```

A call carries its deadline as gRPC has it, and its token as the metadata `authorization: Bearer
...`. Every call comes back with the trailing metadata `headwise-request-id`, its name in the
server's log. `grpc.health.v1` answers for `headwise.v1.Inference`, `headwise.v1.Control` and the
whole (`""`).
"""

ERRORS_HEAD = """\
## Errors

A call that fails ends with a status whose details (`grpc-status-details-bin`) are messages of
`google.rpc`: always an `ErrorInfo` (domain `headwise`) with the reason and a `RequestInfo`.

| code | reason | when | further details | try again |
|---|---|---|---|---|"""
ERRORS = (
    (
        "`INVALID_ARGUMENT`",
        "`INVALID_REQUEST`",
        "the request can never be served",
        "`BadRequest`: every fault, by its field's path",
        "no",
    ),
    ("`UNAUTHENTICATED`", "`UNAUTHENTICATED`", "no token, or an unknown one", "", "no"),
    ("`PERMISSION_DENIED`", "`FORBIDDEN`", "this caller may not do this", "", "no"),
    ("`NOT_FOUND`", "`UNKNOWN_MODEL`", "no such model is served here", "`ResourceInfo`", "no"),
    ("`UNIMPLEMENTED`", "`UNKNOWN_METHOD`", "no service has this method", "", "no"),
    ("`RESOURCE_EXHAUSTED`", "`OVERLOADED`", "the queue is full", "`RetryInfo`", "after its delay"),
    (
        "`RESOURCE_EXHAUSTED`",
        "`LIMIT_EXCEEDED`",
        "the caller's own limit is reached",
        "`RetryInfo`, `QuotaFailure`",
        "after its delay",
    ),
    (
        "`RESOURCE_EXHAUSTED`",
        "",
        "the message is larger than the server takes: gRPC's own answer",
        "",
        "no",
    ),
    (
        "`UNAVAILABLE`",
        "`UNAVAILABLE`",
        "the ranks cannot compute just now, or the server is ending",
        "",
        "yes, [with what has arrived](sdk.md#when-the-connection-breaks)",
    ),
    (
        "`DEADLINE_EXCEEDED`",
        "`DEADLINE_EXCEEDED`",
        "the deadline went by; the work has stopped",
        "",
        "with a later one",
    ),
    (
        "`FAILED_PRECONDITION`",
        "`NO_TOKEN`",
        "no token can be drawn, such as where `logit_bias` rules out all",
        "",
        "no",
    ),
    (
        "`INTERNAL`",
        "`RANKS_LOST`",
        "ranks were lost again and again while this request was computed",
        "",
        "no",
    ),
    (
        "`INTERNAL`",
        "`INTERNAL`",
        "a bug; the server's log tells more under `error_id`, of the `ErrorInfo`",
        "",
        "no",
    ),
)

_SCALARS = {
    number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()
}
# Which field of its parent's descriptor holds a child: the steps of a comment's path.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _ONEOFS, _METHODS, _VALUES = 2, 8, 2, 2


@dataclass(frozen=True)
class Source:
    """A proto file, and the comment that stands before each of its definitions, by path."""

    file: FileDescriptorProto
    comments: dict[tuple[int, ...], str]

    def comment(self, *path: int) -> str:
        return " ".join(self.comments.get(path, "").split())


def sources() -> list[Source]:
    """The protos of the package, what people call first; exits as protoc does if it fails."""
    names = sorted(
        (str(path.relative_to(PROTO)) for path in (PROTO / "headwise/v1").glob("*.proto")),
        key=lambda name: not name.endswith("inference.proto"),
    )
    well_known = files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "protos"
        flags = [f"-I{PROTO}", f"-I{well_known}", "--include_source_info"]
        status = protoc.main(["protoc", *flags, f"--descriptor_set_out={out}", *names])
        if status != 0:
            raise SystemExit(status)
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    by_name = {file.name: file for file in found.file}
    return [
        Source(
            by_name[name],
            {
                tuple(place.path): place.leading_comments
                for place in by_name[name].source_code_info.location
            },
        )
        for name in names
    ]


def page() -> str:
    """All of docs/api.md."""
    found = sources()
    lines = [HEAD, *contents(found)]
    for source in found:
        for number, service in enumerate(source.file.service):
            lines += service_section(source, number, service)
    lines += [ERRORS_HEAD, *("| " + " | ".join(row) + " |" for row in ERRORS), ""]
    for source in found:
        lines += [f"## Messages of {source.file.name.rpartition('/')[2]}", ""]
        for number, message in enumerate(source.file.message_type):
            lines += message_section(source, number, message)
        for number, enum in enumerate(source.file.enum_type):
            lines += enum_section(source, number, enum)
    return "\n".join(lines).rstrip() + "\n"


def contents(found: list[Source]) -> Iterator[str]:
    """Every method, linked."""
    yield "| method | takes | returns |"
    yield "|---|---|---|"
    for source in found:
        for service in source.file.service:
            for method in service.method:
                stream = "stream of " if method.server_streaming else ""
                name = f"{service.name}.{method.name}"
                yield (
                    f"| [`{name}`](#{service.name.lower()}) | {link(method.input_type)} "
                    f"| {stream}{link(method.output_type)} |"
                )
    yield ""


def service_section(source: Source, number: int, service: ServiceDescriptorProto) -> Iterator[str]:
    yield f"## {service.name}"
    yield ""
    yield source.comment(_SERVICES, number)
    yield ""
    yield "| method | |"
    yield "|---|---|"
    for position, method in enumerate(service.method):
        comment = source.comment(_SERVICES, number, _METHODS, position)
        yield f"| `{method.name}` | {cell(comment)} |"
    yield ""


def message_section(source: Source, number: int, message: DescriptorProto) -> Iterator[str]:
    yield f"### {message.name}"
    yield ""
    yield source.comment(_MESSAGES, number)
    yield ""
    if not message.field:
        return
    yield "| field | type | | |"
    yield "|---|---|---|---|"
    for position, field in enumerate(message.field):
        comment = source.comment(_MESSAGES, number, _FIELDS, position)
        kind = type_of(message, field)
        yield f"| `{field.name}` | {kind} | {presence(message, field)} | {cell(comment)} |"
    yield ""
    for position, oneof in enumerate(message.oneof_decl):
        comment = source.comment(_MESSAGES, number, _ONEOFS, position)
        if comment:
            yield f"`{oneof.name}`: {comment}"
            yield ""


def enum_section(source: Source, number: int, enum: EnumDescriptorProto) -> Iterator[str]:
    yield f"### {enum.name}"
    yield ""
    yield source.comment(_ENUMS, number)
    yield ""
    yield "| value | number | |"
    yield "|---|---|---|"
    for position, value in enumerate(enum.value):
        comment = source.comment(_ENUMS, number, _VALUES, position)
        yield f"| `{value.name}` | {value.number} | {cell(comment)} |"
    yield ""


def type_of(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """A field's type; a map's as one."""
    entry = next(
        (
            nested
            for nested in message.nested_type
            if nested.options.map_entry
            and field.type_name.endswith(f".{message.name}.{nested.name}")
        ),
        None,
    )
    if entry is not None:
        key, value = (type_of(entry, part) for part in entry.field)
        return f"map of {key} to {value}"
    return link(field.type_name) if field.type_name else f"`{_SCALARS[field.type]}`"


def presence(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """Whether a field may be absent, or repeat, or is one of several."""
    if field.label == FieldDescriptorProto.LABEL_REPEATED and not message.nested_type:
        return "repeated"
    if field.proto3_optional:
        return "optional"
    if field.HasField("oneof_index"):
        return f"one of `{message.oneof_decl[field.oneof_index].name}`"
    return "optional" if field.type == FieldDescriptorProto.TYPE_MESSAGE else ""


def link(type_name: str) -> str:
    """A message or an enum: ours are on this page, well-known types are named in full."""
    full = type_name.removeprefix(".")
    name = full.removeprefix(f"{PACKAGE}.")
    return f"`{full}`" if name == full else f"[`{name}`](#{name.lower()})"


def cell(text: str) -> str:
    """Text inside a table."""
    return text.replace("|", "\\|")


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    arguments = parser.parse_args()
    current = page()
    if PAGE.is_file() and PAGE.read_text() == current:
        print(f"{PAGE.relative_to(ROOT)} is current")
        return 0
    if arguments.check:
        print("docs/api.md is not what the protos say", file=sys.stderr)
        print("run: python scripts/api_reference.py", file=sys.stderr)
        return 1
    PAGE.write_text(current)
    print(f"{PAGE.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
