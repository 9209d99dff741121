"""The console script `pbs-client`: JSON lines on stdout, messages on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pbs_client.cli.arguments import EXIT_CODES, make_parser
from pbs_client.errors import (
    CorruptDataError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    NotFoundError,
    PbsError,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
)

_QUIET = {
    "GRPC_VERBOSITY": "NONE",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_INTERRUPTED = 130  # as shells report Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code that `pbs-client --help` documents."""
    arguments = make_parser().parse_args(argv)
    # stderr is for our messages only, not for those of libraries.
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        arguments.run(arguments)
    except PbsError as error:
        _complain(f"{error}; {_next_step(error, arguments.server)}")
        return _exit_code(error)
    except (ValueError, TypeError, OSError, ImportError) as error:
        _complain(str(error))
        return EXIT_CODES["usage"]
    except KeyboardInterrupt:
        _complain("interrupted")
        return _INTERRUPTED
    return 0


def _complain(message: str) -> None:
    print("pbs-client: " + " ".join(message.split()), file=sys.stderr)


def _exit_code(error: PbsError) -> int:
    if isinstance(error, CorruptDataError):
        return EXIT_CODES["corrupt"]
    if isinstance(error, (UnavailableError, DeadlineExceededError)):
        return EXIT_CODES["unreachable"]
    return EXIT_CODES["refused"]


def _next_step(error: PbsError, server: str) -> str:
    """Advice for the user about an error."""
    if isinstance(error, CorruptDataError):
        return "run it again; if it fails again, check memory and the network"
    if isinstance(error, UnavailableError):
        return f"check that pbs-prefilld runs at {server} and has loaded its models"
    if isinstance(error, DeadlineExceededError):
        return "allow more time with --timeout"
    if isinstance(error, NotFoundError):
        return f"`pbs-client models --server {server}` lists the models"
    if isinstance(error, FailedPreconditionError):
        return "use the model that the cache was made with"
    if isinstance(error, ResourceExhaustedError):
        after = error.retry_after
        return "try again " + ("later" if after is None else f"in {after:.1f} s")
    if isinstance(error, UnimplementedError):
        return f"`pbs-client info --server {server}` prints what the server supports"
    if isinstance(error, InternalError):
        return "this is a fault of the server; its log has details"
    return "change the request and run it again"
