#!/usr/bin/env python3
"""A TCP relay that cuts, flips, slows and holds connections by a plan.

A process of its own: one command per line of standard input, a JSON object, and one
reply per line of standard output.

    {"do": "open", "server": "HOST:PORT", "plans": [PLAN, ...]}   -> {"port": N}
                       "port": N chooses it
    {"do": "held"}     -> {"held": true} when a connection has come to its hold, or
                       {"held": false} when one ended before
    {"do": "go"}       lets held connections go on
    {"do": "close"}    -> {"connections": N, "faults": N, "down": bytes, "up": bytes}

Connection i follows plans[i]; connections after the last plan are left alone. A plan has
these fields, all optional; `way` is "down", from the server (the default), or "up".

    {"way": ..., "cut_at": BYTE, "reset": BOOL}   ends the connection, by RST if reset
    {"way": ..., "flip_at": BYTE, "bit": 0..7}    flips a bit
    {"hold_at": BYTE}                             then passes nothing either way until go
    {"rate": BYTES}                               per second, from the server
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
from typing import Any

READ_BYTES = 64 << 10
SLOW_READ_BYTES = 16 << 10
BUFFER_BYTES = 64 << 10  # so that a relay which reads nothing takes little

Plan = dict[str, Any]


class Session:
    """One open port."""

    def __init__(self, host: str, port: int, plans: list[Plan], own_port: int) -> None:
        self._server, self._plans = (host, port), plans
        self.counts = {"connections": 0, "faults": 0, "down": 0, "up": 0}
        self.held, self.gate = asyncio.Event(), asyncio.Event()
        self.ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = socket.create_server(("127.0.0.1", own_port))
        self._listener.setblocking(False)
        self._spawn(self._accept())

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    async def wait_for_hold(self) -> bool:
        """Whether a connection came to its hold before one ended."""
        waits = [asyncio.ensure_future(e.wait()) for e in (self.held, self.ended)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return self.held.is_set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._listener)
            index = self.counts["connections"]
            self.counts["connections"] += 1
            plan = self._plans[index] if index < len(self._plans) else {}
            self._spawn(self._relay(client, plan))

    async def _relay(self, client: socket.socket, plan: Plan) -> None:
        loop = asyncio.get_running_loop()
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        for end in (client, server):
            end.setblocking(False)
        connection = Connection(self, plan)
        pumps: list[asyncio.Task[None]] = []
        try:
            await loop.sock_connect(server, self._server)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pumps = [
                self._spawn(connection.pump("down", server, client)),
                self._spawn(connection.pump("up", client, server)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass  # the server is gone: the client's connection ends, too
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (client, server):
                if connection.reset:
                    linger = struct.pack("ii", 1, 0)
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                end.close()
            self.ended.set()


class Connection:
    """One relayed connection with its plan."""

    def __init__(self, session: Session, plan: Plan) -> None:
        self._session, self._plan = session, plan
        self._stopped = False  # nothing passes until the gate opens
        self.reset = False

    async def pump(self, way: str, source: socket.socket, target: socket.socket) -> None:
        """Passes bytes on until an end closes or the plan cuts."""
        loop = asyncio.get_running_loop()
        plan, offset = self._plan, 0
        mine = plan.get("way", "down") == way
        rate = plan.get("rate") if way == "down" else None
        with contextlib.suppress(OSError):
            while True:
                data = await loop.sock_recv(source, SLOW_READ_BYTES if rate else READ_BYTES)
                if not data:
                    return
                if self._stopped:
                    await self._session.gate.wait()
                if mine and self._hits("flip_at", offset, data):
                    changed = bytearray(data)
                    changed[plan["flip_at"] - offset] ^= 1 << plan["bit"]
                    data = bytes(changed)
                if mine and self._hits("cut_at", offset, data):
                    await loop.sock_sendall(target, data[: plan["cut_at"] - offset])
                    self.reset = bool(plan.get("reset"))
                    return
                if way == "down" and self._hits("hold_at", offset, data):
                    before = plan["hold_at"] - offset
                    await loop.sock_sendall(target, data[:before])
                    self._stopped = True
                    self._session.held.set()
                    await self._session.gate.wait()
                    self._stopped = False
                    await loop.sock_sendall(target, data[before:])
                else:
                    await loop.sock_sendall(target, data)
                offset += len(data)
                self._session.counts[way] += len(data)
                if rate:
                    await asyncio.sleep(len(data) / rate)

    def _hits(self, name: str, offset: int, data: bytes) -> bool:
        at = self._plan.get(name)
        hit = at is not None and offset <= at < offset + len(data)
        if hit:
            self._session.counts["faults"] += 1
        return hit


async def serve() -> None:
    """Answers commands until standard input ends."""
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    session: Session | None = None
    while line := await lines.readline():
        command = json.loads(line)
        reply: dict[str, Any] = {}
        if command["do"] == "open":
            host, _, port = command["server"].rpartition(":")
            own_port = command.get("port", 0)
            session = Session(host, int(port), command["plans"], own_port)
            reply = {"port": session.port}
        elif session is None:
            reply = {"error": "no open port"}
        elif command["do"] == "held":
            reply = {"held": await session.wait_for_hold()}
        elif command["do"] == "go":
            session.gate.set()
        elif command["do"] == "close":
            await session.close()
            reply, session = session.counts, None
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    asyncio.run(serve())
