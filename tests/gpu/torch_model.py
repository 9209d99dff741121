"""The peer of a served prefill: a plain Llama in torch. Eager, fused QKV and gate/up
products, rotations that are not scaled, torch's SDPA on cuDNN or, where that does not take
the heads, flash; every row through every layer, keys and values kept on the device."""

from __future__ import annotations

import contextlib
import json
import pathlib

import torch
from peers import BACKENDS
from safetensors import safe_open
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

# Of a layer, and what each is fused of.
PARTS = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "output": "self_attn.o_proj",
    "gate_up": "mlp.gate_proj mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half split; x [heads, tokens, head_dim]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Llama:
    """Weights on the device; prefill() keeps what a decoder would go on with."""

    def __init__(self, folder: pathlib.Path, device: str):
        self.device = device
        self.config = json.loads((folder / "config.json").read_text())
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt", device=device) as shard:
                tensors |= {name: shard.get_tensor(name) for name in shard.keys()}
        self.embedding = tensors["model.embed_tokens.weight"]
        self.head = tensors.get("lm_head.weight", self.embedding)
        self.norm = tensors["model.norm.weight"]
        self.layers = [self._layer(tensors, i) for i in range(self.config["num_hidden_layers"])]
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        half = self.config["head_dim"] // 2  # of a plain rotation
        powers = -torch.arange(half, device=device, dtype=torch.float64) / half
        self.frequencies = self.config["rope_theta"] ** powers

    @staticmethod
    def _layer(tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        def weight(names: str) -> torch.Tensor:
            parts = [tensors.pop(f"model.layers.{index}.{name}.weight") for name in names.split()]
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        return {name: weight(parts) for name, parts in PARTS.items()}

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        on_gpu = sdpa_kernel([*BACKENDS.values()], set_priority=True)
        with contextlib.nullcontext() if self.device == "cpu" else on_gpu:
            return functional.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=True
            )[0]

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.config["rms_norm_eps"])

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> torch.Tensor:
        """f32 logits of the last token."""
        config, count = self.config, len(tokens)
        heads = (config["num_attention_heads"], *[config["num_key_value_heads"]] * 2)
        head_dim = config["head_dim"]
        x = functional.embedding(torch.tensor(tokens, device=self.device), self.embedding)
        positions = torch.arange(count, device=self.device, dtype=torch.float64)
        angles = torch.outer(positions, self.frequencies).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        self.cache = []
        for layer in self.layers:
            qkv = functional.linear(self._normed(x, layer["attention_norm"]), layer["qkv"])
            parts = qkv.split([number * head_dim for number in heads], -1)
            q, k, v = (part.view(count, -1, head_dim).transpose(0, 1) for part in parts)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            self.cache.append((k, v.contiguous()))
            attended = self._attend(q, *self.cache[-1])
            x = x + functional.linear(attended.transpose(0, 1).reshape(count, -1), layer["output"])
            gate_up = functional.linear(self._normed(x, layer["mlp_norm"]), layer["gate_up"])
            gate, up = gate_up.chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, layer["down"])
        return functional.linear(self._normed(x[-1], self.norm), self.head).float()
