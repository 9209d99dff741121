#!/usr/bin/env python3
"""Writes a tiny random model with a tokenizer and a chat template.

python tests/demo/tiny_chat_model.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
import tiny_models
import tiny_tokenizer


def main() -> int:
    """Writes the folder; config.json comes with the weights."""
    folder = Path(sys.argv[1])
    tiny_tokenizer.make(folder)
    tiny_models.make("llama, llama3 rope", folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
