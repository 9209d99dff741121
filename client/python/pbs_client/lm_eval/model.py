"""PbsLM: the harness's model of transformers, with the prefill done at a server.

Generation: the prompt is prefilled at the server, and decoded here.
Log-likelihood of a continuation: its context is prefilled at the server, once for all
its continuations. These are scored here, with full attention to the context's cache.
Rolling log-likelihood (perplexity of a whole text) has no context, so it is refused.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from pbs_client.cli.attention import attention_from, option_names
from pbs_client.client import WORK_TIMEOUT_SECONDS
from pbs_client.hf.remote import CONCURRENCY, RemotePrefill
from pbs_client.options import Attention, method_of

# Arguments of the harness's model that a cache made elsewhere cannot serve, and why.
_UNSUPPORTED = {
    "autogptq": "the server has other weights",
    "backend": "the model is a decoder",
    "delta": "the server has other weights",
    "gptqmodel": "the server has other weights",
    "parallelize": "caches are filled on one device",
    "peft": "the server has other weights",
    "tp_plan": "caches are filled on one device",
}
_OFF = (None, False, "", "default", "causal")

_log = logging.getLogger(__name__)


@register_model("pbs")
class PbsLM(HFLM):  # type: ignore[misc]
    """A transformers model of the harness whose prompts are prefilled at a server."""

    _model: Any  # of HFLM: the model, then the RemotePrefill over it
    _max_length: int | None

    def __init__(
        self,
        pretrained: str,
        server: str,
        name: str = "",
        concurrency: int = CONCURRENCY,
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        **arguments: Any,
    ) -> None:
        """Loads the model and connects.

        Args:
            pretrained: the model's folder.
            server: HOST:PORT.
            name: the model's name at the server; "" when it has one model.
            concurrency: prompts that are prefilled at once.
            timeout: seconds for each prompt; None is no limit.
            **arguments: method and its options, by the names of Attention's fields and
                of the methods'; without any, the server's default profile applies. All
                others are those of the harness's own model `hf`.

        Raises:
            ValueError: an argument is unknown or not supported; it is named.
            IncompatibleCacheError, PbsError: as RemotePrefill.
        """
        attention = take_attention(arguments)
        _check(arguments)
        super().__init__(pretrained=pretrained, **arguments)
        if hasattr(self, "accelerator"):
            raise ValueError(
                "model pbs runs in one process; start it without `accelerate launch`"
            )
        self._model = RemotePrefill(
            self._model,
            server,
            name=name,
            attention=attention,
            concurrency=concurrency,
            timeout=timeout,
        )
        self._check_length()
        self._densities: list[float] = []
        self._digests: set[str] = set()

    def _check_length(self) -> None:
        """Makes max_length one that the server takes. ValueError: it was asked for."""
        limit = self._model.served_model.tokens_max
        if self._max_length and self._max_length > limit:
            raise ValueError(
                f"max_length {self._max_length} exceeds tokens_max {limit} of the "
                "server; lower it, or start the server with a higher "
                "admission.tokens_max"
            )
        if self.max_length > limit:
            _log.warning(
                "prompts are cut to the %d tokens that the server takes; the model "
                "takes %d",
                limit,
                self.max_length,
            )
            self._max_length = limit

    def get_model_info(self) -> dict[str, Any]:
        """What a result says of the model: also what the server did."""
        info: dict[str, Any] = super().get_model_info()
        served = self._model.served_model
        count = len(self._densities)
        return {
            **info,
            "pbs_model_digest": served.model_digest,
            "pbs_sparsity_digests": sorted(self._digests),
            "pbs_prefills": count,
            "pbs_mean_density": sum(self._densities) / count if count else None,
        }

    def _note_prefills(self) -> None:
        for prefill in self._model.prefills:
            self._densities.append(prefill.stats.density)
            self._digests.add(prefill.sparsity_digest)

    def _model_generate(self, *arguments: Any, **named: Any) -> Any:
        tokens = super()._model_generate(*arguments, **named)
        self._note_prefills()
        return tokens

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is it the greedy one) of each continuation, in order."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            # As the harness does: what is too long loses tokens at its beginning.
            kept = self.max_length + 1 - len(continuation)
            if kept < 1:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, more than "
                    f"max_length {self.max_length}"
                )
            by_context.setdefault(tuple(context[-kept:]), []).append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = [(c, i) for c, indices in by_context.items() for i in indices]
        scores = self._model.score(
            ((context, requests[index][2]) for context, index in order),
            dtype=self.softmax_dtype,
        )
        self._note_prefills()
        for (_, index), score in zip(order, scores):
            answers[index] = (score.log_likelihood, score.is_greedy)
            if requests[index][0] is not None:
                self.cache_hook.add_partial(
                    "loglikelihood", requests[index][0], answers[index]
                )
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "loglikelihood_rolling scores a text without a context, so there is "
            "nothing to prefill at the server; run such tasks with --model hf"
        )


def take_attention(arguments: dict[str, Any]) -> Attention:
    """Removes the attention options from the arguments of a model.

    Raises:
        ValueError: the method is unknown, or does not have an option.
    """
    names = [name for name in option_names() if name in arguments]
    given = {name: arguments.pop(name) for name in names}
    method = method_of(arguments.pop("method", None))
    return attention_from(
        argparse.Namespace(method=None if method is None else method.name, **given)
    )


def _check(arguments: Mapping[str, Any]) -> None:
    """ValueError for arguments of `hf` that are not supported."""
    for name, reason in _UNSUPPORTED.items():
        if arguments.get(name) not in _OFF:
            raise ValueError(f"model pbs does not support {name}: {reason}")
    if str(arguments.get("batch_size", 1)).startswith("auto"):
        raise ValueError(
            "model pbs does not support batch_size auto, which would prefill here; "
            "state a number"
        )
