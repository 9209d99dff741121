#!/usr/bin/env python3
"""Says whether peers built from descriptor set OLD can talk to peers built from NEW.

    tests/structure/check_wire_compat.py OLD NEW

Both are FileDescriptorSets (proto/*.binpb; `protoc --descriptor_set_out`). What
OLD has, NEW must have unchanged: messages, fields (number, name, type, label, oneof),
enum values, and methods with their types and streaming. Additions are fine. Names
count, because configuration files are protobuf JSON. Prints one line per violation.

Exit codes: 0 compatible, 1 not, 2 usage or unreadable files. Needs `protobuf`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError

_FieldProto = descriptor_pb2.FieldDescriptorProto

# What the contract holds: path of a thing -> what must not change about it.
Contract = dict[str, str]


def contract_of(files: descriptor_pb2.FileDescriptorSet) -> Contract:
    """Every message, field, enum value and method of the set, flattened."""
    contract: Contract = {}
    for file in files.file:
        if file.package.startswith("google.protobuf"):
            continue  # the runtime's own; not ours to keep
        for message in file.message_type:
            contract.update(_message_items(f"{file.package}.{message.name}", message))
        for enum in file.enum_type:
            contract.update(_enum_items(f"{file.package}.{enum.name}", enum))
        for service in file.service:
            for method in service.method:
                contract[f"method {file.package}.{service.name}.{method.name}"] = (
                    f"{_stream(method.client_streaming)}{method.input_type} -> "
                    f"{_stream(method.server_streaming)}{method.output_type}"
                )
    return contract


def violations(old: Contract, new: Contract) -> Iterator[str]:
    """One sentence per thing of `old` that `new` lacks or has changed."""
    for path, meaning in old.items():
        if path not in new:
            yield f"{path} is gone (it was: {meaning})"
        elif new[path] != meaning:
            yield f"{path} changed from ({meaning}) to ({new[path]})"


def _message_items(
    path: str, message: descriptor_pb2.DescriptorProto
) -> Iterator[tuple[str, str]]:
    yield f"message {path}", "message"
    for field in message.field:
        yield f"field {path}.{field.name}", _field_meaning(message, field)
    for nested in message.nested_type:
        yield from _message_items(f"{path}.{nested.name}", nested)
    for enum in message.enum_type:
        yield from _enum_items(f"{path}.{enum.name}", enum)


def _enum_items(
    path: str, enum: descriptor_pb2.EnumDescriptorProto
) -> Iterator[tuple[str, str]]:
    for value in enum.value:
        yield f"enum value {path}.{value.name}", f"number {value.number}"


def _field_meaning(
    message: descriptor_pb2.DescriptorProto, field: descriptor_pb2.FieldDescriptorProto
) -> str:
    parts = [
        f"number {field.number}",
        _FieldProto.Label.Name(field.label),
        _FieldProto.Type.Name(field.type) + field.type_name,
    ]
    if field.proto3_optional:
        parts.append("optional")
    elif field.HasField("oneof_index"):
        parts.append(f"oneof {message.oneof_decl[field.oneof_index].name}")
    return ", ".join(parts)


def _stream(streaming: bool) -> str:
    return "stream " if streaming else ""


def _read(path: Path) -> descriptor_pb2.FileDescriptorSet:
    files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())
    if not files.file:
        raise DecodeError("no file descriptors in it")
    return files


def main() -> int:
    """Compares the sets that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD", help="the published set")
    parser.add_argument("new", type=Path, metavar="NEW", help="the set to publish")
    arguments = parser.parse_args()
    contracts = []
    for path in (arguments.old, arguments.new):
        try:
            contracts.append(contract_of(_read(path)))
        except (OSError, DecodeError) as error:
            print(f"cannot read descriptor set {path}: {error}", file=sys.stderr)
            return 2
    found = list(violations(*contracts))
    for violation in found:
        print(violation)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
