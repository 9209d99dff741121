"""A tokenizer folder in Hugging Face form: text to ids, and an id to text.

Files: tokenizer.json; tokenizer_config.json and special_tokens_map.json, if there, for
special tokens and the chat template; chat_template.jinja, chat_template.json.

Threading: encoding may run in several threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from pbs_client.gateway.chat_template import ChatTemplate

_FILE_BYTES_MAX = 256 << 20  # of tokenizer.json, the largest
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token",
                   "cls_token", "mask_token")  # fmt: skip


class Tokenizer:
    """A loaded folder.

    Attributes:
        chat: None when the folder has no chat template.
    """

    def __init__(self, folder: Path, chat_template: Path | None = None) -> None:
        """Reads the folder.

        Args:
            folder: has tokenizer.json.
            chat_template: a Jinja file to use instead of the folder's.

        Raises:
            ValueError: a file is missing or wrong; it is named.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; --tokenizer needs it")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"{path}: {error}") from None
        # They are for training; a prompt is neither cut nor filled.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_object(folder / "tokenizer_config.json")
        special = _special_tokens(
            _read_object(folder / "special_tokens_map.json"), config
        )
        sources = _template_sources(folder, config, chat_template)
        self.chat = ChatTemplate(sources, special) if sources else None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text."""
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=add_special_tokens
        ).ids
        return ids

    def text_of(self, token_id: int, skip_special_tokens: bool) -> str:
        """The text of one id; "" for one that the tokenizer does not have."""
        text: str = self._tokenizer.decode(
            [token_id], skip_special_tokens=skip_special_tokens
        )
        return text


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _FILE_BYTES_MAX:
        raise ValueError(f"{path} has more than {_FILE_BYTES_MAX} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _special_tokens(*maps: Mapping[str, Any]) -> dict[str, str]:
    """Names and texts; a later map wins."""
    found = {}
    for values in maps:
        for name in _SPECIAL_TOKENS:
            token = values.get(name)
            text = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(text, str):
                found[name] = text
    return found


def _template_sources(
    folder: Path, config: Mapping[str, Any], given: Path | None
) -> dict[str, str]:
    """The chat templates by name: the given file, a file of the folder, the config."""
    for path in (given, folder / "chat_template.jinja"):
        if path is not None and (path == given or path.is_file()):
            try:
                return {"default": path.read_text("utf-8")}
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"chat template {path}: {error}") from None
    beside = _read_object(folder / "chat_template.json").get("chat_template")
    template = config.get("chat_template") if beside is None else beside
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list) and all(_is_named(entry) for entry in template):
        return {entry["name"]: entry["template"] for entry in template}
    raise ValueError(
        f"{folder}: chat_template is neither a text nor a list of named texts"
    )


def _is_named(entry: Any) -> bool:
    return isinstance(entry, Mapping) and all(
        isinstance(entry.get(name), str) for name in ("name", "template")
    )
