#!/usr/bin/env python3
"""The peer of a served prefill: a plain Llama in torch, one run at a time on request.

stdin, one JSON object a line; "do" and what else there is:
  model     path: a folder of scripts/make_random_model.py, architecture llama
  prefill   tokens, seed, logits (a file for those of the last token, optional)
            -> seconds (ids on the host to the greedy token on the host), first_token, sdpa
  linear    name, rows, in, out, dtype (f32 | bf16), repetitions in a run
  run       name -> wall seconds and CPU seconds
  drop      name
stdout: one JSON line per command, as tests/bench/bench_worker.cc speaks.

Plain: eager, fused QKV and gate/up products, torch's SDPA on the backend that is faster at
the length, every row through every layer, keys and values kept on the device.

Runs on the GPU where torch has one, else on the CPU.

usage: torch_model.py
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from safetensors import safe_open
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from workload import prompt

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "float32": torch.float32,
          "bfloat16": torch.bfloat16}  # fmt: skip
FASTER = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
TRIALS = 3


def inverse_frequencies(config: dict) -> torch.Tensor:
    """Of the rotary embedding, plain or scaled by llama3: f64 [head_dim / 2]."""
    half = config["head_dim"] // 2
    plain = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    scaling = config["rope_scaling"]
    if scaling is None:
        return plain
    waves = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((waves - low) / (high - low)).clamp(0, 1)
    return plain * (share + (1 - share) / scaling["factor"])


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
        self.sdpa: dict[int, str] = {}  # by length
        self.frequencies = inverse_frequencies(self.config).to(device)

    @staticmethod
    def _layer(tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        def weight(*names: str) -> torch.Tensor:
            parts = [tensors.pop(f"model.layers.{index}.{name}.weight") for name in names]
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        attention = [f"self_attn.{name}_proj" for name in "qkv"]
        return {
            "attention_norm": weight("input_layernorm"),
            "qkv": weight(*attention),
            "output": weight("self_attn.o_proj"),
            "mlp_norm": weight("post_attention_layernorm"),
            "gate_up": weight("mlp.gate_proj", "mlp.up_proj"),
            "down": weight("mlp.down_proj"),
        }

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        def call() -> torch.Tensor:
            return functional.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=True
            )[0]

        if self.device == "cpu":
            return call()
        tokens = q.shape[1]
        if tokens not in self.sdpa:
            self.sdpa[tokens] = fastest(call)
        with sdpa_kernel(FASTER[self.sdpa[tokens]]):
            return call()

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


def fastest(call: Callable[[], torch.Tensor]) -> str:
    """Which backend of torch runs a call of attention fastest. RuntimeError if none does."""
    seconds = {}
    for name, backend in FASTER.items():
        try:
            with sdpa_kernel(backend):
                call()
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(TRIALS):
                    call()
                torch.cuda.synchronize()
                seconds[name] = time.perf_counter() - begin
        except RuntimeError:
            continue  # it does not take these heads
    if not seconds:
        raise RuntimeError(f"none of {', '.join(FASTER)} runs this attention")
    return min(seconds, key=seconds.__getitem__)


class Worker:
    """Answers commands."""

    def __init__(self, device: str):
        self.device = device
        self.model: Llama | None = None
        self.cases: dict[str, Callable[[], None]] = {}

    def do(self, words: dict) -> dict:
        """The reply to one command."""
        command = words["do"]
        if command == "model":
            self.model = Llama(pathlib.Path(words["path"]), self.device)
        elif command == "prefill":
            return self.prefill(words)
        elif command == "linear":
            self.cases[words["name"]] = self.linear(words)
            self.cases[words["name"]]()  # warms up
        elif command == "run":
            return self.run(words["name"])
        elif command == "drop":
            self.cases.pop(words["name"], None)
        else:
            return {"error": f"unknown command {command}"}
        return {"ok": True}

    def prefill(self, words: dict) -> dict:
        """From ids on the host to the greedy token on the host."""
        if self.model is None:
            return {"error": "prefill needs a model first"}
        count = words["tokens"]
        tokens = prompt(count, self.model.config["vocab_size"], words["seed"])
        self.synchronize()
        begin = time.perf_counter()
        logits = self.model.prefill(tokens)
        first_token = int(logits.argmax())
        seconds = time.perf_counter() - begin
        if "logits" in words:
            np.save(words["logits"], logits.cpu().numpy())
        sdpa = self.model.sdpa.get(count, "its own choice")
        return {"seconds": seconds, "first_token": first_token, "sdpa": sdpa}

    def linear(self, words: dict) -> Callable[[], None]:
        """A linear layer without bias, some times."""
        dtype = DTYPES[words["dtype"]]
        shapes = ((words["rows"], words["in"]), (words["out"], words["in"]))
        x, weight = (torch.randn(*s, device=self.device).to(dtype) for s in shapes)

        @torch.inference_mode()
        def run() -> None:
            for _ in range(words["repetitions"]):
                functional.linear(x, weight)
            self.synchronize()

        return run

    def run(self, name: str) -> dict:
        """Times one run."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.cases[name]()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Serves commands until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    worker = Worker("cuda" if torch.cuda.is_available() else "cpu")
    for line in sys.stdin:
        try:
            reply = worker.do(json.loads(line))
        except (RuntimeError, OSError) as error:
            reply = {"error": " ".join(str(error).split())[:200]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
