"""Arrow Flight as a peer of pbs-bench: a server process and a client, both pyarrow.

    python flight_peer.py

It prints the pid of its server. Then it answers lines on standard input:

    prepare BYTES CHUNK_BYTES   the server makes a table; "ok"
    run STREAMS                 STREAMS connections fetch a part each, in parallel; "ok",
                                or what is wrong

The bytes stay in the batches that Flight received: nothing copies them to another place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from pyarrow import flight


def pattern(size: int) -> np.ndarray:
    """The bytes that are served."""
    return (np.arange(size, dtype=np.uint32) * 2654435761 >> 24).astype(np.uint8)


class Server(flight.FlightServerBase):
    """Serves the rows [begin, end) of a table, each row a chunk of bytes."""

    def __init__(self) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._batches: list[pa.RecordBatch] = []

    def do_action(self, context, action):
        size, chunk = (int(value) for value in action.body.to_pybytes().split())
        values = pattern(size)
        self._batches = [
            pa.record_batch([pa.array(values[at : at + chunk])], names=["bytes"])
            for at in range(0, size, chunk)
        ]
        yield flight.Result(b"%d" % len(self._batches))

    def do_get(self, context, ticket):
        part, parts = (int(value) for value in ticket.ticket.split())
        number = len(self._batches)
        wanted = self._batches[number * part // parts : number * (part + 1) // parts]
        return flight.GeneratorStream(wanted[0].schema, iter(wanted))


class Client:
    """Connections to the server, one for each stream."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._connections: list[flight.FlightClient] = []
        self._bytes = 0

    def prepare(self, size: int, chunk: int) -> str:
        action = flight.Action("prepare", b"%d %d" % (size, chunk))
        list(self._connection(0).do_action(action))
        self._bytes = size
        reader = self._connection(0).do_get(flight.Ticket(b"0 1"))
        received = reader.read_all().column(0).to_numpy()
        right = np.array_equal(received, pattern(size))
        return "ok" if right else "received other bytes"

    def run(self, streams: int) -> str:
        for index in range(streams):
            self._connection(index)
        with ThreadPoolExecutor(streams) as pool:
            parts = pool.map(lambda part: self._fetch(part, streams), range(streams))
            received = sum(parts)
        if received != self._bytes:
            return f"received {received} of {self._bytes} bytes"
        return "ok"

    def _connection(self, index: int) -> flight.FlightClient:
        while len(self._connections) <= index:
            self._connections.append(flight.FlightClient(self._location))
        return self._connections[index]

    def _fetch(self, part: int, parts: int) -> int:
        reader = self._connection(part).do_get(flight.Ticket(b"%d %d" % (part, parts)))
        received = 0
        for batch in reader:
            received += len(batch.data.column(0))
        return received


def serve() -> None:
    """Serves until standard input ends, as it does with the program that started us."""
    server = Server()
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)  # streams may still be open


def main() -> None:
    command = [sys.executable, __file__, "--serve"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as server:
        client = Client(f"grpc://127.0.0.1:{server.stdout.readline().strip()}")
        print(server.pid, flush=True)
        for line in sys.stdin:
            name, *values = line.split()
            print(getattr(client, name)(*map(int, values)), flush=True)


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
