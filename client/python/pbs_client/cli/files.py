"""Files that the commands of `pbs-client` read and write."""

from __future__ import annotations

import json
from pathlib import Path

from pbs_client.safetensors_file import check_folder

TOKENS_FILE_BYTES_MAX = 64 << 20


def read_tokens(path: str) -> list[int]:
    """A JSON list of integers. ValueError for anything else."""
    with Path(path).open("rb") as file:
        text = file.read(TOKENS_FILE_BYTES_MAX + 1)
    if len(text) > TOKENS_FILE_BYTES_MAX:
        raise ValueError(f"{path} has more than {TOKENS_FILE_BYTES_MAX} bytes")
    try:
        tokens = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise ValueError(f"{path} is not a JSON list of integers")
    return tokens


def check_output(path: str | None) -> None:
    """Before the work: OSError when no file can be made at `path`. None is no file."""
    if path is not None and not Path(path).exists():
        check_folder(path)
