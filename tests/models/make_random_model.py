#!/usr/bin/env python3
"""Writes a model folder of any size with random weights, for timing and tests.

    python tests/models/make_random_model.py --preset 1b-4layer --out build/models/1b-4layer
    python tests/models/make_random_model.py --architecture qwen3 --hidden-size 256 ... --out X

The folder has config.json and safetensors (sharded when --shard-size says so), as
transformers reads them. Weights keep activations near unit size; norms and biases are
random too. A random model selects key blocks like white noise: use it to time, never to
judge quality.

Needs numpy only. Deterministic: equal arguments give equal bytes, and the same weights
whatever the shard size. Memory stays near 100 MB; disk is checked first.

--torch DEVICE draws the weights with torch there, other ones, and writes the shards side
by side: seconds instead of minutes for a large model, a few GB of the device's memory.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import shutil
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

CHUNK_ELEMENTS = 4 << 20
SHARDS_AT_ONCE = 8  # with --torch
DTYPES = {"f32": ("F32", 4, "float32"), "f16": ("F16", 2, "float16"),
          "bf16": ("BF16", 2, "bfloat16")}
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
           "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Name -> defaults of the options below.
PRESETS = {
    "tiny": dict(hidden_size=128, intermediate_size=256, layers=2, heads=4, kv_heads=2,
                 head_dim=32, vocab_size=512, positions=8192, dtype="f32"),
    "1b-4layer": dict(hidden_size=2048, intermediate_size=8192, layers=4, heads=32,
                      kv_heads=8, head_dim=64, vocab_size=32000, tied=True,
                      positions=131072, rope_theta=5e5, rope="llama3"),
    "llama-3.2-1b": dict(hidden_size=2048, intermediate_size=8192, layers=16, heads=32,
                         kv_heads=8, head_dim=64, vocab_size=128256, tied=True,
                         positions=131072, rope_theta=5e5, rope="llama3"),
    "llama-3.1-8b": dict(hidden_size=4096, intermediate_size=14336, layers=32, heads=32,
                         kv_heads=8, head_dim=128, vocab_size=128256, positions=131072,
                         rope_theta=5e5, rope="llama3", shard_size="5GB"),
    "qwen2.5-0.5b": dict(architecture="qwen2", hidden_size=896, intermediate_size=4864,
                         layers=24, heads=14, kv_heads=2, head_dim=64,
                         vocab_size=151936, tied=True, positions=32768, rope_theta=1e6),
    "qwen3-0.6b": dict(architecture="qwen3", hidden_size=1024, intermediate_size=3072,
                       layers=28, heads=16, kv_heads=8, head_dim=128,
                       vocab_size=151936, tied=True, positions=40960, rope_theta=1e6),
    "mistral-7b": dict(architecture="mistral", hidden_size=4096,
                       intermediate_size=14336, layers=32, heads=32, kv_heads=8,
                       head_dim=128, vocab_size=32768, positions=32768, rope_theta=1e6,
                       shard_size="5GB"),
}


def fail(message: str) -> None:
    sys.exit(f"make_random_model.py: {message}")


def parse_size(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    for unit, factor in units.items():
        number = text.upper().removesuffix(unit)
        if text.upper().endswith(unit) and number.replace(".", "", 1).isdigit():
            return int(float(number) * factor)
    raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500MB or 5GB")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="folder to create")
    add("--preset", choices=PRESETS, help="sizes of a known model; options override it")
    add("--architecture", choices=CLASSES, default="llama")
    add("--dtype", choices=DTYPES, default="bf16", help="of every tensor (bf16)")
    for name, what in (
        ("hidden-size", "width of the residual stream"),
        ("intermediate-size", "width of the MLP"),
        ("layers", "number of layers"),
        ("heads", "query heads"),
        ("kv-heads", "key and value heads; divides --heads"),
        ("head-dim", "32, 64, 96, 128 or 256"),
        ("vocab-size", "token ids"),
        ("positions", "max_position_embeddings"),
    ):
        add(f"--{name}", type=int, help=what)
    add("--rope-theta", type=float, default=1e4)
    add("--rope", choices=["default", "llama3"], default="default")
    add("--tied", action=argparse.BooleanOptionalAction, default=False,
        help="output head = embedding")
    add("--attention-bias", action=argparse.BooleanOptionalAction, default=False,
        help="llama and qwen3; qwen2 always has biases on q, k, v")
    add("--shard-size", type=parse_size, default=None, help="e.g. 500MB; default: one file")
    add("--seed", type=int, default=1)
    add("--torch", metavar="DEVICE", help="draw with torch there, such as cuda; bf16 only")
    add("--force", action="store_true", help="write into a folder that has a model")
    preset = parser.parse_known_args()[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    arguments = parser.parse_args()
    for name in ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads",
                 "head_dim", "vocab_size", "positions"):
        value = getattr(arguments, name)
        if value is None:
            parser.error(f"--{name.replace('_', '-')} is needed without --preset")
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} is not positive")
    if arguments.torch is not None and arguments.dtype != "bf16":
        parser.error(f"--torch draws bf16, not --dtype {arguments.dtype}")
    if arguments.heads % arguments.kv_heads != 0:
        parser.error(f"--heads {arguments.heads} is not a multiple of --kv-heads "
                     f"{arguments.kv_heads}")
    return arguments


def make_config(a: argparse.Namespace) -> dict:
    config = {
        "architectures": [CLASSES[a.architecture]],
        "model_type": a.architecture,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": a.positions,
        "rope_theta": a.rope_theta,
        "rope_scaling": LLAMA3_ROPE if a.rope == "llama3" else None,
        "tie_word_embeddings": a.tied,
        "torch_dtype": DTYPES[a.dtype][2],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if a.architecture in ("llama", "qwen3"):
        config["attention_bias"] = a.attention_bias
    if a.architecture == "mistral":
        config["sliding_window"] = None
    if a.architecture in ("qwen2", "qwen3"):
        config["use_sliding_window"] = False
    return config


def tensor_shapes(a: argparse.Namespace) -> dict[str, list[int]]:
    """Every tensor of the model in file order."""
    hidden, inner = a.hidden_size, a.intermediate_size
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    all_biases = a.architecture in ("llama", "qwen3") and a.attention_bias
    qkv_biases = all_biases or a.architecture == "qwen2"
    shapes = {"model.embed_tokens.weight": [a.vocab_size, hidden]}
    for layer in range(a.layers):
        prefix = f"model.layers.{layer}."
        linear = {
            "self_attn.q_proj": (queries, hidden, qkv_biases),
            "self_attn.k_proj": (keys, hidden, qkv_biases),
            "self_attn.v_proj": (keys, hidden, qkv_biases),
            "self_attn.o_proj": (hidden, queries, all_biases),
            "mlp.gate_proj": (inner, hidden, False),
            "mlp.up_proj": (inner, hidden, False),
            "mlp.down_proj": (hidden, inner, False),
        }
        shapes[prefix + "input_layernorm.weight"] = [hidden]
        for name, (rows, columns, bias) in linear.items():
            shapes[f"{prefix}{name}.weight"] = [rows, columns]
            if bias:
                shapes[f"{prefix}{name}.bias"] = [rows]
        if a.architecture == "qwen3":
            shapes[prefix + "self_attn.q_norm.weight"] = [a.head_dim]
            shapes[prefix + "self_attn.k_norm.weight"] = [a.head_dim]
        shapes[prefix + "post_attention_layernorm.weight"] = [hidden]
    shapes["model.norm.weight"] = [hidden]
    if not a.tied:
        shapes["lm_head.weight"] = [a.vocab_size, hidden]
    return shapes


def values(name: str, shape: list[int], generator: np.random.Generator
           ) -> Iterator[np.ndarray]:
    """A tensor's values as f32, a few million at a time."""
    left = math.prod(shape)
    while left > 0:
        count = min(left, CHUNK_ELEMENTS)
        left -= count
        if "norm" in name:
            yield generator.uniform(0.5, 1.5, count).astype(np.float32)
            continue
        normal = generator.standard_normal(count, dtype=np.float32)
        scale = 0.1 if name.endswith("bias") else 1 / math.sqrt(shape[1])
        yield normal * np.float32(scale)


def drawn_by_torch(name: str, shape: list[int], device: str, seed: list[int]) -> memoryview:
    """A tensor's bytes in bf16, as values() scales them."""
    import torch

    options = {"device": device, "generator": torch.Generator(device)}
    options["generator"].manual_seed(seed[0] << 32 | seed[1])
    if "norm" in name:
        drawn = 0.5 + torch.rand(shape, **options)
    else:
        scale = 0.1 if name.endswith("bias") else 1 / math.sqrt(shape[1])
        drawn = torch.randn(shape, **options).mul_(scale)
    return drawn.to(torch.bfloat16).view(torch.uint8).cpu().numpy().data


def encode(chunk: np.ndarray, dtype: str) -> bytes:
    if dtype == "f32":
        return chunk.astype("<f4").tobytes()
    if dtype == "f16":
        return chunk.astype("<f2").tobytes()
    bits = chunk.astype("<f4").view("<u4")  # round to nearest, ties to even
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def split_shards(sizes: dict[str, int], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if limit is not None and shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def progress(text: str) -> None:
    """One line that overwrites itself, where a person watches."""
    if sys.stderr.isatty():
        print(f"\r{text:<100}", end="" if text else "\r", file=sys.stderr)


def write_shard(path: pathlib.Path, names: list[str], shapes: dict[str, list[int]],
                order: dict[str, int], a: argparse.Namespace) -> None:
    stored, element_bytes, _ = DTYPES[a.dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        size = math.prod(shapes[name]) * element_bytes
        header[name] = {"dtype": stored, "shape": shapes[name],
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensor data starts on 8 bytes
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            seed = [a.seed, order[name]]
            if a.torch is not None:
                out.write(drawn_by_torch(name, shapes[name], a.torch, seed))
                continue
            generator = np.random.default_rng(seed)
            for chunk in values(name, shapes[name], generator):
                out.write(encode(chunk, a.dtype))
            progress(f"{path.name}: {name}")
    progress("")


def main() -> None:
    a = parse_arguments()
    shapes = tensor_shapes(a)
    sizes = {name: math.prod(shape) * DTYPES[a.dtype][1] for name, shape in shapes.items()}
    total = sum(sizes.values())
    if (a.out / "config.json").exists() and not a.force:
        fail(f"{a.out} has a model already; --force overwrites it")
    a.out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(a.out).free
    if total > free:
        fail(f"{total / 1e9:.1f} GB are needed in {a.out}, {free / 1e9:.1f} GB are free")
    for old in a.out.glob("model*.safetensors*"):
        old.unlink()
    order = {name: index for index, name in enumerate(shapes)}
    shards = split_shards(sizes, a.shard_size)
    weight_map = {}
    with ThreadPoolExecutor(SHARDS_AT_ONCE if a.torch else 1) as pool:
        written = []
        for index, names in enumerate(shards, start=1):
            file = ("model.safetensors" if len(shards) == 1 else
                    f"model-{index:05}-of-{len(shards):05}.safetensors")
            weight_map |= {name: file for name in names}
            written.append(pool.submit(write_shard, a.out / file, names, shapes, order, a))
        for shard in written:
            shard.result()
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {"total_size": total},
                                 "weight_map": weight_map}, indent=2)
        (a.out / "model.safetensors.index.json").write_text(index_text)
    (a.out / "config.json").write_text(json.dumps(make_config(a), indent=2))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    print(f"{a.out}: {parameters / 1e6:.1f} M parameters, {total / 1e9:.2f} GB {a.dtype}")


if __name__ == "__main__":
    main()
