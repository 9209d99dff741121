"""Hugging Face bridge: prefills at a server, and generates with `transformers` here.

    model = RemotePrefill(hf.load_model("/models/llama"), server="127.0.0.1:50051")
    output = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"))

    tokens = hf.generate(model, prompt, client.fetch(ticket), max_new_tokens=64)

Needs torch and transformers (4.57 or 5.x): pip install "pbs-client[hf]".

transformers takes the position of the next token from the length of the cache. A cache
of the whole prompt together with the prompt alone therefore computes the last token
twice, one position late, and decodes wrong tokens without an error. Right pairs are:

* the cache of all but the last token, with the prompt;
* the whole cache, with the prompt and the first token that the prefill returned.

RemotePrefill and generate_inputs() make such pairs, and check_generate_inputs() refuses
all others.

Modules: remote.py (RemotePrefill), generation.py (one prompt, its cache at hand),
models.py (loading, and the checks of a model), caches.py, scores.py.

Errors: ImportError names the packages to install. IncompatibleCacheError (a ValueError)
means that a cache or a server's model is not of this model.
"""

from __future__ import annotations

try:
    import torch  # noqa: F401
    import transformers
except ImportError as error:
    raise ImportError(
        f"{error}; pbs_client.hf needs torch and transformers: "
        'pip install "pbs-client[hf]"'
    ) from error

from pbs_client.hf.caches import (
    IncompatibleCacheError,
    check_compatible,
    dynamic_cache,
)
from pbs_client.hf.generation import (
    check_generate_inputs,
    generate,
    generate_inputs,
)
from pbs_client.hf.models import (
    check_first_layer,
    check_release_reads,
    check_same_model,
    load_model,
)
from pbs_client.hf.remote import RemotePrefill
from pbs_client.hf.scores import Score

__all__ = [
    "IncompatibleCacheError",
    "RemotePrefill",
    "Score",
    "check_compatible",
    "check_first_layer",
    "check_generate_inputs",
    "check_release_reads",
    "check_same_model",
    "dynamic_cache",
    "generate",
    "generate_inputs",
    "load_model",
    "transformers",
]
