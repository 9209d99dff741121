"""RemotePrefill: generate() of transformers, with the prefill done at a server.

    model = RemotePrefill(hf.load_model("/models/llama"), server="127.0.0.1:50051")
    output = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"))

generate() gets the cache of all tokens of a prompt but the last from the server. Then
transformers itself goes on: it computes the last token, and decodes. So everything
after the prefill (sampling, beams, logits processors, stopping, streaming) is its own.

Threading: a RemotePrefill may be used from one thread at a time, as its model.
Errors: a PbsError of the server ends the call, and cancels the other prompts of its
batch. The server then holds nothing for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
import transformers

from pbs_client._prefill import PrefillResult, find_model
from pbs_client.client import WORK_TIMEOUT_SECONDS, Client
from pbs_client.hf._node import PrefillNode
from pbs_client.hf._prompts import Prompts, Settings
from pbs_client.hf.caches import (
    LeftPadded,
    cache_argument,
    check_compatible,
    dynamic_cache,
)
from pbs_client.hf.models import check_first_layer, check_same_model
from pbs_client.hf.scores import Score, score_after
from pbs_client.kv import KvCache, check_wire
from pbs_client.options import Attention, Method, attention_of
from pbs_client.results import ModelInfo

CONCURRENCY = 4  # prefills at once
CONCURRENCY_MAX = 256
CONTINUE_TOKENS_MAX = 512  # of a turn that is computed here

_WIRE_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 and before


class RemotePrefill:
    """A causal language model whose prompts are prefilled at a server.

    It has the attributes of the model; generate() and score() prefill remotely. Calling
    it is the model's own forward, here.
    """

    def __init__(
        self,
        model: Any,
        server: str | Client,
        *,
        name: str = "",
        attention: Method | str | Attention | None = None,
        concurrency: int = CONCURRENCY,
        continue_tokens_max: int = CONTINUE_TOKENS_MAX,
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        wire_dtype: str | None = None,
    ) -> None:
        """Connects, and checks that the server has this model.

        Args:
            model: a transformers causal language model, on one device. Its weights are
                those of the server's: their first layer is compared with the first
                prefill.
            server: HOST:PORT, or a Client, for TLS or metadata; it stays open.
            name: the model's name at the server; "" when it has one model.
            attention: as Client.prefill(); None is the server's default profile, which
                need not be exact; "dense" is.
            concurrency: prompts of a batch that are prefilled at once, 1 .. 256.
            continue_tokens_max: see generate(), past_key_values.
            timeout: seconds for each prompt; None is no limit.
            wire_dtype: as KvFormat. With "f8_e4m3" every cache is an approximation,
                also that of "dense".

        Raises:
            IncompatibleCacheError: the server's model differs; it says in what.
            NotFoundError: the server has no model of that name.
            PbsError: it cannot be asked.
            ValueError: an argument is out of range or unknown, or the model is on many devices.
        """
        if not 1 <= concurrency <= CONCURRENCY_MAX:
            raise ValueError(
                f"concurrency {concurrency} is outside [1, {CONCURRENCY_MAX}]"
            )
        if continue_tokens_max < 0:
            raise ValueError(f"continue_tokens_max {continue_tokens_max} is below 0")
        check_wire(wire_dtype, None)
        devices = set((getattr(model, "hf_device_map", None) or {}).values())
        if len(devices) > 1:
            raise ValueError(
                f"the model is spread over {len(devices)} devices; RemotePrefill fills "
                "caches on one device: load it with device_map of one"
            )
        self._model = model
        self._continue_tokens_max = continue_tokens_max
        self._is_checked = False
        # Tokens of the caches that generate() returned or was given.
        self._known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._prefills: list[PrefillResult] = []
        with contextlib.ExitStack() as exits:
            if isinstance(server, str):
                server = exits.enter_context(Client(server))
            info = find_model(server.models(), name)
            check_same_model(model, info)
            self._served_model = info
            self._node = PrefillNode(
                server,
                info.name,
                attention_of(attention),
                _WIRE_DTYPES.get(model.dtype),
                wire_dtype,
                concurrency,
                timeout,
            )
            self._exits = exits.pop_all()

    def __enter__(self) -> RemotePrefill:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection, unless a Client was given. The model stays usable."""
        self._exits.close()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The model's own forward, without the server."""
        return self._model(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and "_model" not in self.__dict__:
            raise AttributeError(name)  # a copy that has no state yet
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # `remote.generation_config = ...` is for the model, which reads it.
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._model, name, value)

    @property
    def served_model(self) -> ModelInfo:
        """What the server says of its model."""
        return self._served_model

    @property
    def prefills(self) -> tuple[PrefillResult, ...]:
        """What the server said of the prompts of the last generate() or score().

        In the order in which they were sent, and without their caches: statistics,
        densities, digests. A prompt that was computed here is not among them.
        """
        return tuple(self._prefills)

    # ---- generating

    def generate(
        self, inputs: Any = None, generation_config: Any = None, **arguments: Any
    ) -> Any:
        """Generates as the model does, with the prefill done at the server.

        Prompts of one token are computed here, as there is nothing to prefill.

        Args:
            inputs: token ids, [prompts, tokens], padded on the left; or input_ids.
            generation_config: as generate() of the model.
            **arguments: as generate() of the model. attention_mask: as there.
                past_key_values (or cache): an empty DynamicCache is filled. One with
                the earlier turns of a conversation goes on here when the ids begin with
                these turns and add at most continue_tokens_max tokens. Otherwise the
                whole conversation is prefilled again at the server, into this cache.

        Returns:
            What generate() of the model returns.

        Raises:
            ValueError: an argument is not supported (it is named), padding is not on
                the left, or the cache leaves no token to compute.
            IncompatibleCacheError: the server's weights are not the model's.
            PbsError: of the server; nothing is held there.
        """
        self._prefills.clear()
        ids = arguments.pop("input_ids", None) if inputs is None else inputs
        caches = [arguments.pop(name, None) for name in _CACHE_NAMES]
        given = next((cache for cache in caches if cache is not None), None)
        model_config = self._model.generation_config
        settings = Settings(arguments, generation_config, model_config)
        settings.check()
        prompts = Prompts.of(ids, arguments.pop("attention_mask", None), settings)
        cache = given
        if not self._continues(prompts, given):
            filled = self._filled(prompts, settings.repeats)
            if given is None:
                cache = filled
            elif filled is not None:
                given.layers = filled.layers
        # Of the class, so that `model.generate = remote.generate` is possible.
        output = type(self._model).generate(
            self._model,
            prompts.ids,
            generation_config=generation_config,
            attention_mask=prompts.mask,
            **({} if cache is None else {cache_argument(self._model): cache}),
            **arguments,
        )
        self._remember(cache, output, settings)
        return output

    def _continues(self, prompts: Prompts, cache: Any) -> bool:
        """Whether the model goes on from a given cache by itself.

        Raises:
            ValueError: the cache is of another kind, or too long for the ids.
        """
        if cache is None:
            return False
        if type(cache) is not transformers.DynamicCache:
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; RemotePrefill fills a "
                "DynamicCache"
            )
        cached, width = cache.get_seq_length(), prompts.mask.shape[1]
        if cached == 0:
            return False
        if cached >= width:
            raise ValueError(
                f"the attention mask has {width} tokens and the cache {cached}; it "
                "must leave at least one to compute: append the new turn to the ids"
            )
        if prompts.ids.shape[1] < width:
            return True  # the ids are those of the new turn alone
        known = self._known.get(cache)
        if known is not None and not torch.equal(
            known[:, :cached], prompts.ids[:, :cached].to(known.device)
        ):
            return False  # the conversation was edited
        return bool(width - cached <= self._continue_tokens_max)

    def _filled(self, prompts: Prompts, repeats: int) -> Any:
        """The cache of all but the last token of each prompt; None without any.

        Errors as generate().
        """
        rows = prompts.rows()
        places: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            if len(row) > 1:
                places.setdefault(row, []).append(index)
        if not places:
            return None
        made = LeftPadded(self._model, len(rows), prompts.ids.shape[1])
        with contextlib.closing(self._prefilled(list(places))) as caches:
            for indices, cache in zip(places.values(), caches):
                for index in indices:
                    made.set_row(index, cache)
        return made.finish(repeats)

    def _remember(self, cache: Any, output: Any, settings: Settings) -> None:
        """Notes the tokens of a cache that the caller has, for the next turn."""
        sequences = output["sequences"] if isinstance(output, dict) else output
        if cache is None and isinstance(output, dict):
            cache = next((output[n] for n in _CACHE_NAMES if n in output), None)
        if cache is not None and settings.repeats == 1:
            self._known[cache] = sequences.detach().clone()

    # ---- scoring

    def score(
        self,
        pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
        *,
        dtype: Any = torch.float32,
    ) -> list[Score]:
        """Log-likelihoods of continuations after prompts that the server prefills.

        Each prompt is sent once, however many continuations it has. The continuations
        are computed here, with full attention to the prompt's cache.

        Args:
            pairs: token ids of (prompt, continuation), each at least one.
            dtype: torch dtype of the softmax; None is the model's.

        Raises:
            ValueError: a prompt or a continuation is empty.
            IncompatibleCacheError, PbsError: as generate().
        """
        self._prefills.clear()
        wanted = [(tuple(map(int, p)), tuple(map(int, c))) for p, c in pairs]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (prompt, continuation) in enumerate(wanted):
            if not prompt or not continuation:
                name = "prompt" if not prompt else "continuation"
                raise ValueError(f"{name} {index} is empty; one token is needed")
            groups.setdefault(prompt, []).append(index)
        scores: dict[int, Score] = {}
        model = self._model
        sent = [prompt for prompt in groups if len(prompt) > 1]
        with contextlib.closing(self._prefilled(sent)) as caches:
            for prompt, indices in groups.items():
                cache = transformers.DynamicCache()
                if len(prompt) > 1:
                    cache = dynamic_cache(
                        next(caches),
                        len(prompt) - 1,
                        dtype=model.dtype,
                        device=model.device,
                    )
                for index in indices:
                    continuation = wanted[index][1]
                    scores[index] = score_after(
                        model, prompt[-1], continuation, cache, dtype
                    )
        return [scores[index] for index in range(len(wanted))]

    # ---- the server

    def _prefilled(
        self, prompts: Sequence[tuple[int, ...]]
    ) -> Generator[KvCache, None, None]:
        """Caches of prompts, checked. Errors as generate()."""
        with contextlib.closing(self._node.prefilled(prompts)) as results:
            for prompt, result in zip(prompts, results):
                cache = result.kv
                assert cache is not None
                check_compatible(self._model, cache, self._served_model.model_digest)
                if not self._is_checked:
                    check_first_layer(self._model, prompt, cache)
                    self._is_checked = True
                self._prefills.append(dataclasses.replace(result, kv=None))
                yield cache
