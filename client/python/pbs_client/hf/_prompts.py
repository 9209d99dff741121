"""The prompts of a batch, and what generate() is asked to do with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# What a cache that was made elsewhere cannot serve: arguments of generate(), the values
# that leave them off, and why.
_OFF: tuple[Any, ...] = (None, False)
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_model": (_OFF, "assisted decoding prefills a second model here"),
    "assistant_early_exit": (_OFF, "assisted decoding crops caches of its own"),
    "cache_implementation": ((None, "dynamic"), "the cache is a DynamicCache"),
    "custom_generate": (_OFF, "it is code that may prefill by itself"),
    "dola_layers": (_OFF, "it needs the hidden states of the prompt"),
    "guidance_scale": ((None, 1, 1.0), "guidance prefills a second prompt here"),
    "inputs_embeds": (_OFF, "the server takes token ids"),
    "negative_prompt_ids": (_OFF, "guidance prefills a second prompt here"),
    "output_attentions": (_OFF, "the server does not return those of the prompt"),
    "output_hidden_states": (_OFF, "the server does not return those of the prompt"),
    "penalty_alpha": ((None, 0, 0.0), "it needs the hidden states of the prompt"),
    "position_ids": (_OFF, "positions follow from the attention mask"),
    "prefill_chunk_size": (_OFF, "the server prefills the whole prompt"),
    "prompt_lookup_num_tokens": (_OFF, "assisted decoding crops caches of its own"),
    "token_healing": (_OFF, "it changes the prompt"),
    "use_mtp": (_OFF, "it needs the hidden states of the prompt"),
}


class Settings:
    """The settings of one generate(): its arguments, before those of its configs."""

    def __init__(self, arguments: Mapping[str, Any], *configs: Any) -> None:
        """Takes them.

        Args:
            arguments: keyword arguments of generate().
            configs: the GenerationConfigs, or None, that it falls back to, in order.
        """
        self._arguments, self._configs = arguments, configs

    def __getitem__(self, name: str) -> Any:
        """The value that applies; None when nothing sets it."""
        found = [self._arguments.get(name)]
        found += [getattr(config, name, None) for config in self._configs]
        return next((value for value in found if value is not None), None)

    @property
    def repeats(self) -> int:
        """How often generate() repeats each prompt: beams, or sequences to return."""
        return max(self["num_beams"] or 1, self["num_return_sequences"] or 1)

    def check(self) -> None:
        """ValueError for what RemotePrefill does not support; it is named."""
        for name, (off, reason) in _UNSUPPORTED.items():
            if not _is_off(self[name], off):
                raise ValueError(
                    f"RemotePrefill does not support {name}: {reason}; leave it out, "
                    "or call generate() of the model itself"
                )
        if self["use_cache"] is False:
            raise ValueError(
                "RemotePrefill needs use_cache: the prefill is the cache; leave it out"
            )


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    """Whether a value is one of those; a tensor or a model never is."""
    return value is None or (
        isinstance(value, (bool, int, float, str)) and value in off
    )


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, padded on the left.

    Attributes:
        ids: [rows, width], a torch tensor.
        mask: the attention mask, of the same shape: 0 is padding.
    """

    ids: Any
    mask: Any

    @classmethod
    def of(cls, ids: Any, mask: Any, settings: Settings) -> Prompts:
        """From the arguments of generate(); without a mask, as transformers infers it.

        Raises:
            ValueError: a shape is wrong, or padding is not on the left.
        """
        if ids is None or ids.ndim != 2 or ids.shape[1] == 0:
            shape = "missing" if ids is None else f"of shape {tuple(ids.shape)}"
            raise ValueError(f"input_ids are {shape}; they must be [prompts, tokens]")
        if mask is None:
            mask = _inferred_mask(ids, settings)
        if mask.ndim != 2 or mask.shape[0] != ids.shape[0]:
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} does not fit "
                f"input_ids of shape {tuple(ids.shape)}"
            )
        return cls(ids, mask)

    def rows(self) -> list[tuple[int, ...]]:
        """The tokens of each prompt, without padding.

        Raises:
            ValueError: the mask is not that of prompts padded on the left.
        """
        if self.mask.shape != self.ids.shape:
            raise ValueError(
                f"attention_mask of shape {tuple(self.mask.shape)} does not fit "
                f"input_ids of shape {tuple(self.ids.shape)}"
            )
        real = self.mask != 0
        if not bool((real[:, -1] & (real[:, 1:] >= real[:, :-1]).all(1)).all()):
            raise ValueError(
                "attention_mask is not that of prompts padded on the left: each row is "
                "zeros, then ones; set tokenizer.padding_side = 'left'"
            )
        return [
            tuple(ids[keep].tolist()) for ids, keep in zip(self.ids.cpu(), real.cpu())
        ]


def _inferred_mask(ids: Any, settings: Settings) -> Any:
    """The mask that transformers assumes without one."""
    pad, end = settings["pad_token_id"], settings["eos_token_id"]
    ends = end if isinstance(end, (list, tuple)) else [end]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return (ids != pad).to(ids.dtype)
