#!/usr/bin/env python3
"""Makes tiny random models with what transformers computes from them.

    python tests/models/make_tiny_models.py --out build/tiny-models

One folder per model: config.json, safetensors, and

  expected.safetensors   ids [tokens], logits f32 [tokens, vocab], layers.N.k and
                         layers.N.v [kv_heads, tokens, head_dim] after the prompt
  expected.json          greedy continuation of the prompt, by generate()

All in f32 from the stored weights. Biases and norms are random: transformers starts
them at 0 and 1, and a loader that ignored them would pass. Prompts run past the original
context of the scaled rotations, so that scaling matters.

Needs torch and transformers. Seeded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file

PROMPT_TOKENS = 300
NEW_TOKENS = 24
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SIZES = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 232,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}


@dataclasses.dataclass
class Tiny:
    """One model: a config class, what differs from SIZES, and how it is stored."""

    config: type
    changes: dict
    dtype: torch.dtype = torch.float32
    shard: str = "1GB"
    # Rewrites config.json the way folders were published before transformers 5.
    old_spelling: bool = False


Llama = transformers.LlamaConfig
MODELS = {
    "llama3": Tiny(Llama, {"head_dim": 64, "rope_parameters": LLAMA3}),
    "llama3-tied-bf16": Tiny(
        Llama,
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
        dtype=torch.bfloat16,
        shard="100KB",
        old_spelling=True,
    ),
    "llama-biases-f16": Tiny(
        Llama,
        {
            "rope_parameters": DEFAULT,
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 4,
        },
        dtype=torch.float16,
    ),
    "llama-linear": Tiny(Llama, {"rope_parameters": LINEAR}, old_spelling=True),
    "qwen2-yarn": Tiny(transformers.Qwen2Config, {"rope_parameters": YARN}),
    "qwen2-yarn-given": Tiny(
        transformers.Qwen2Config,
        {
            "tie_word_embeddings": True,
            "rope_parameters": YARN
            | {"attention_factor": 1.2, "beta_fast": 16.0, "beta_slow": 2.0},
        },
        old_spelling=True,
    ),
    "qwen2-bf16": Tiny(
        transformers.Qwen2Config, {"rope_parameters": DEFAULT}, dtype=torch.bfloat16
    ),
    "qwen3": Tiny(
        transformers.Qwen3Config, {"head_dim": 64, "rope_parameters": DEFAULT}
    ),
    "qwen3-tied-bias": Tiny(
        transformers.Qwen3Config,
        {
            "head_dim": 96,
            "rope_parameters": DEFAULT,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        dtype=torch.bfloat16,
    ),
    "mistral": Tiny(
        transformers.MistralConfig,
        {"head_dim": 64, "rope_parameters": DEFAULT, "sliding_window": None},
        shard="200KB",
    ),
}


def randomise(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.5)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5)


def respell(path: pathlib.Path) -> None:
    """rope_parameters, dtype -> rope_theta, rope_scaling, torch_dtype."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    # Linear scaling was published with "type", the later ones with "rope_type".
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2))


def expected(model, folder: pathlib.Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size
    ids = torch.randint(2, vocab, (1, PROMPT_TOKENS), generator=generator)
    out = model(ids, use_cache=True)
    tensors = {"ids": ids[0].int(), "logits": out.logits[0].float().contiguous()}
    # Releases from 5.24 on call it `cache`.
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    for index, layer in enumerate(cache.layers):
        tensors[f"layers.{index}.k"] = layer.keys[0].contiguous()
        tensors[f"layers.{index}.v"] = layer.values[0].contiguous()
    save_file(tensors, folder / "expected.safetensors")
    generated = model.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    greedy = generated[0, PROMPT_TOKENS:].tolist()
    (folder / "expected.json").write_text(
        json.dumps({"prompt": ids[0].tolist(), "greedy": greedy})
    )


@torch.no_grad()
def make(name: str, out: pathlib.Path, seed: int = 7) -> pathlib.Path:
    tiny = MODELS[name]
    torch.manual_seed(seed)
    config = tiny.config(**(SIZES | {"tie_word_embeddings": False} | tiny.changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model)
    model = model.to(tiny.dtype).eval()
    model.config.dtype = tiny.dtype
    folder = out / name
    model.save_pretrained(folder, max_shard_size=tiny.shard)
    # Stored weights, computed in f32. min_new_tokens below needs no eos in the way.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    expected(model, folder, seed)
    if tiny.old_spelling:
        respell(folder / "config.json")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="*", choices=sorted(MODELS), default=None)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or MODELS:
        print(make(name, arguments.out))


if __name__ == "__main__":
    main()
