"""`pbs-client sink`: writes pushed caches to files."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

from pbs_client.cli.commands import print_line, write_cache
from pbs_client.errors import PbsError
from pbs_client.results import to_json
from pbs_client.sink import BYTES_MAX, CREDIT_BYTES, PUSHES_MAX, KvSink, PushHeader

_DESCRIPTION = """\
Listens for caches that prefill servers push (`prefill --push`), checks each and writes
it to a file of its own. Ctrl-C ends it. Whoever reaches the address can push: listen
where only prefill servers do.

writes:  FOLDER/TRANSFER_ID.safetensors: layers.N.k, layers.N.v, each [kv_heads, tokens,
         head_dim], or [tokens, kv_heads, head_dim] with layout NHD
prints:  a JSON line when it listens: listens; one for each cache: transfer_id, model,
         digests, sizes, bytes, output; one for each push that failed: error"""


def sink(arguments: argparse.Namespace) -> None:
    """`pbs-client sink`."""
    folder = Path(arguments.output)
    if not folder.is_dir():
        raise OSError(f"--output {folder} is not a folder")
    line_lock = threading.Lock()

    def say(line: dict[str, Any]) -> None:
        with line_lock:  # failures come from threads of their own
            print_line(line)

    def say_failure(header: PushHeader | None, error: PbsError) -> None:
        known = "" if header is None else header.transfer_id
        say({"transfer_id": known, "error": str(error)})

    with KvSink(
        arguments.listen,
        bytes_max=arguments.bytes_max,
        credit_bytes=arguments.credit_bytes,
        pushes_max=arguments.pushes_max,
        on_failure=say_failure,
    ) as listening:
        say({"listens": listening.target})
        try:
            for pushed in listening:
                header = pushed.header
                path = folder / f"{header.transfer_id}.safetensors"
                write_cache(str(path), pushed.cache)
                say({**to_json(header), "output": str(path)})
        except KeyboardInterrupt:
            return


def add_command(commands: Any) -> None:
    """Adds `sink`, which has no server to connect to, to argparse's subparsers."""
    parser = commands.add_parser(
        "sink",
        help="receive pushed caches",
        description=_DESCRIPTION,
        usage="%(prog)s --listen HOST:PORT --output FOLDER [OPTION ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=sink)
    group = parser.add_argument_group("sink")
    group.add_argument(
        "--listen",
        required=True,
        metavar="HOST:PORT",
        help="as the server's push_targets has it; port 0 takes a free one",
    )
    group.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder for the caches"
    )
    for name, default, text in (
        ("bytes-max", BYTES_MAX, "bytes of all caches under way and not yet written"),
        ("credit-bytes", CREDIT_BYTES, "bytes that a server may send unchecked"),
        ("pushes-max", PUSHES_MAX, "pushes under way at once"),
    ):
        group.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} [{default}]"
        )
