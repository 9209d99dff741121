"""Message classes of pbs.v1, made from the descriptor set inside this package.

There is no generated code: it would tie the client to one range of protobuf versions.
The classes are in a descriptor pool of their own, so that they do not conflict with
other packages' copies of the same files, such as google.rpc.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_DESCRIPTOR_SET = "pbs_v1.binpb"


def _load_pool() -> Any:
    data = resources.files(__package__).joinpath(_DESCRIPTOR_SET).read_bytes()
    pool = descriptor_pool.DescriptorPool()
    # Imports come first in the set: protoc writes them so.
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _load_pool()


def _message_class(full_name: str) -> Any:
    descriptor = POOL.FindMessageTypeByName(full_name)
    if hasattr(message_factory, "GetMessageClass"):  # protobuf >= 4.22
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory(POOL).GetPrototype(descriptor)


def enum_numbers(name: str) -> dict[str, int]:
    """Value names of the enum `pbs.v1.<name>` and their numbers."""
    enum = POOL.FindEnumTypeByName(f"pbs.v1.{name}")
    return {value.name: value.number for value in enum.values}


AttendHeader = _message_class("pbs.v1.AttendHeader")
AttendResponseHeader = _message_class("pbs.v1.AttendResponseHeader")
AttendStats = _message_class("pbs.v1.AttendStats")
AttentionOptions = _message_class("pbs.v1.AttentionOptions")
Admitted = _message_class("pbs.v1.Admitted")
Done = _message_class("pbs.v1.Done")
FetchRequest = _message_class("pbs.v1.FetchRequest")
GetServerInfoRequest = _message_class("pbs.v1.GetServerInfoRequest")
KvAck = _message_class("pbs.v1.KvAck")
KvChunk = _message_class("pbs.v1.KvChunk")
KvDescriptor = _message_class("pbs.v1.KvDescriptor")
KvLease = _message_class("pbs.v1.KvLease")
KvTicket = _message_class("pbs.v1.KvTicket")
LayerDone = _message_class("pbs.v1.LayerDone")
ListModelsRequest = _message_class("pbs.v1.ListModelsRequest")
ListModelsResponse = _message_class("pbs.v1.ListModelsResponse")
ModelInfo = _message_class("pbs.v1.ModelInfo")
PrefillEvent = _message_class("pbs.v1.PrefillEvent")
PrefillRequest = _message_class("pbs.v1.PrefillRequest")
Profile = _message_class("pbs.v1.Profile")
ReleaseRequest = _message_class("pbs.v1.ReleaseRequest")
RenewRequest = _message_class("pbs.v1.RenewRequest")
ServerInfo = _message_class("pbs.v1.ServerInfo")

RetryInfo = _message_class("google.rpc.RetryInfo")
RpcStatus = _message_class("google.rpc.Status")
