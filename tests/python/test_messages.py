"""The wire contract: one descriptor set, everywhere the same, that only ever grows."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from pbs_client import _messages

REPOSITORY = Path(__file__).resolve().parents[2]
COMMITTED = REPOSITORY / "proto" / "pbs_v1.binpb"
CONFIG = REPOSITORY / "proto" / "server_config.binpb"
CHECK = REPOSITORY / "tests" / "structure" / "check_wire_compat.py"
UPDATE = REPOSITORY / "scripts" / "update_descriptor_set.sh"


def own_files(path: Path) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """Files of the set without the protobuf runtime's own, which differ by release."""
    files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
    return {f.name: f for f in files if not f.name.startswith("google/protobuf/")}


def check_compat(old: Path, new: Path) -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, CHECK, old, new], capture_output=True, text=True, check=False
    )
    return run.returncode, run.stdout + run.stderr


def test_the_package_carries_the_committed_descriptor_set():
    packaged = resources.files("pbs_client").joinpath("pbs_v1.binpb").read_bytes()
    assert packaged == COMMITTED.read_bytes()


def test_protoc_makes_the_committed_descriptor_sets_from_the_proto_files(tmp_path):
    subprocess.run([UPDATE, "--output", tmp_path], check=True)
    for committed in (COMMITTED, CONFIG):
        assert own_files(tmp_path / committed.name) == own_files(committed), (
            "run scripts/update_descriptor_set.sh"
        )


def test_the_configuration_of_the_server_is_not_part_of_the_wire():
    file = "pbs/v1/server_config.proto"
    assert file in own_files(CONFIG)
    assert file not in own_files(COMMITTED)


def test_message_classes_do_not_touch_the_default_pool():
    assert _messages.POOL is not descriptor_pool.Default()
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("pbs.v1.KvTicket")


def test_a_set_is_compatible_with_itself():
    assert check_compat(COMMITTED, COMMITTED) == (0, "")


def _message(files, name):
    (found,) = (m for f in files.file for m in f.message_type if m.name == name)
    return found


def _renumber_a_field(files):
    _message(files, "KvTicket").field[0].number = 9


def _retype_a_field(files):
    _message(files, "KvTicket").field[1].type = 4  # fixed64 -> uint64


def _repeat_a_field(files):
    _message(files, "KvTicket").field[0].label = 3


def _rename_a_field(files):
    _message(files, "KvLease").field[0].name = "pass"


def _drop_a_field(files):
    fields = _message(files, "KvChunk").field
    (at,) = (i for i, field in enumerate(fields) if field.name == "payload")
    del fields[at]


def _drop_presence(files):
    _message(files, "PbsOptions").field[0].ClearField("proto3_optional")
    _message(files, "PbsOptions").field[0].ClearField("oneof_index")


def _drop_a_message(files):
    for file in files.file:
        kept = [m for m in file.message_type if m.name != "Admitted"]
        del file.message_type[:]
        file.message_type.extend(kept)


def _renumber_an_enum_value(files):
    (enum,) = (e for f in files.file for e in f.enum_type if e.name == "DType")
    enum.value[1].number = 77


def _stop_streaming_a_method(files):
    (service,) = (s for f in files.file for s in f.service if s.name == "KvSource")
    (fetch,) = (m for m in service.method if m.name == "Fetch")
    fetch.server_streaming = False


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_renumber_a_field, "pbs.v1.KvTicket.handle"),
        (_retype_a_field, "pbs.v1.KvTicket.epoch"),
        (_repeat_a_field, "pbs.v1.KvTicket.handle"),
        (_rename_a_field, "pbs.v1.KvLease.ticket"),
        (_drop_a_field, "pbs.v1.KvChunk.payload"),
        (_drop_presence, "pbs.v1.PbsOptions.block_size"),
        (_drop_a_message, "pbs.v1.Admitted"),
        (_renumber_an_enum_value, "pbs.v1.DType.F32"),
        (_stop_streaming_a_method, "pbs.v1.KvSource.Fetch"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_change_that_breaks_old_peers_is_named(tmp_path, change, named):
    files = descriptor_pb2.FileDescriptorSet.FromString(COMMITTED.read_bytes())
    change(files)
    changed = tmp_path / "changed.binpb"
    changed.write_bytes(files.SerializeToString())
    code, output = check_compat(COMMITTED, changed)
    assert code == 1
    assert named in output


def test_an_added_field_message_and_enum_value_are_compatible(tmp_path):
    files = descriptor_pb2.FileDescriptorSet.FromString(COMMITTED.read_bytes())
    _message(files, "KvTicket").field.add(name="extra", number=99, type=9, label=1)
    (kv,) = (f for f in files.file if f.name == "pbs/v1/kv.proto")
    kv.message_type.add(name="Extra")
    kv.enum_type[0].value.add(name="EXTRA", number=99)
    grown = tmp_path / "grown.binpb"
    grown.write_bytes(files.SerializeToString())
    assert check_compat(COMMITTED, grown) == (0, "")


@pytest.mark.parametrize("content", [b"", b"no descriptor set"], ids=["empty", "text"])
def test_a_file_that_is_no_descriptor_set_is_refused(tmp_path, content):
    broken = tmp_path / "broken.binpb"
    broken.write_bytes(content)
    code, output = check_compat(COMMITTED, broken)
    assert code == 2
    assert str(broken) in output
