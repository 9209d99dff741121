"""Folders as people have them, beside transformers: the same logits.

Each folder is a tiny random model, spelled, split or quantised as published ones are.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

torch = pytest.importorskip("torch", reason="a peer")
transformers = pytest.importorskip("transformers", reason="a peer")
from real_server import running_server  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_model_parity import LOGITS_F32_MAX, difference, dump  # noqa: E402

pytestmark = pytest.mark.peers

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
PROMPT_TOKENS = 50


def make(config, folder: pathlib.Path, dtype=torch.float32):
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.config.dtype = dtype
    model.save_pretrained(folder)


def respell(folder: pathlib.Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def llama_2(folder: pathlib.Path) -> None:
    make(transformers.LlamaConfig(**SIZES), folder)

    def change(config):
        for key in ("rope_parameters", "num_key_value_heads", "rms_norm_eps"):
            del config[key]

    respell(folder, change)


def mistral_with_a_window(folder: pathlib.Path) -> None:
    make(transformers.MistralConfig(**SIZES, sliding_window=PROMPT_TOKENS), folder)


def yarn_without_original(folder: pathlib.Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    make(
        transformers.Qwen2Config(
            **SIZES, max_position_embeddings=64, rope_parameters=rope
        ),
        folder,
    )
    respell(folder, lambda config: config["rope_parameters"].pop("original_max_position_embeddings", None))


def stale_index(folder: pathlib.Path) -> None:
    make(transformers.Qwen3Config(**SIZES, head_dim=32), folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_with_frequencies(folder: pathlib.Path) -> None:
    make(transformers.LlamaConfig(**SIZES), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    weight_map = {"model.layers.0.self_attn.rotary_emb.inv_freq": "a.safetensors"}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
        weight_map |= dict.fromkeys(held, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "spelled",
    [
        llama_2,
        mistral_with_a_window,
        yarn_without_original,
        stale_index,
        index_with_frequencies,
    ],
)
def test_a_folder_gives_transformers_logits(spelled, tmp_path):
    spelled(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_logits(tmp_path, theirs)


@torch.no_grad()
def assert_logits(folder: pathlib.Path, theirs, limit: float = LOGITS_F32_MAX) -> None:
    generator = torch.Generator().manual_seed(3)
    vocab = theirs.config.get_text_config().vocab_size
    ids = torch.randint(2, vocab, (1, PROMPT_TOKENS), generator=generator)
    (folder / "expected.json").write_text(json.dumps({"prompt": ids[0].tolist()}))
    _, ours = dump(folder, "--compute", "f32")
    error = difference(ours["logits"], theirs(ids).logits[0])
    print(f"logits {error:.2e}")
    assert error <= limit


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_vision_model_gives_its_logits(prefix, tmp_path):
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 16,
    }
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **SIZES}, vision_config=vision
    )
    torch.manual_seed(5)
    theirs = transformers.LlavaForConditionalGeneration(config).float().eval()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    inner = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    saved = inner.removesuffix("embed_tokens.weight")
    head = "language_model.lm_head." if prefix.startswith("language") else "lm_head."
    renamed = {
        name.replace(saved, prefix).replace("language_model.lm_head.", "lm_head.")
        .replace("lm_head.", head): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "model.safetensors")
    assert_logits(tmp_path, theirs)


BLOCK = 32


def fp8_blocks(weight):
    """Bytes, scales and numbers of a weight with a scale per 32 x 32 block."""
    rows, cols = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    numbers = stored.float() * scales[:, None, :, None]
    return stored.reshape(rows, cols), scales, numbers.reshape(rows, cols)


def fp8_channels(weight):
    scales = weight.float().abs().amax(1, keepdim=True) / 448
    stored = (weight.float() / scales).to(torch.float8_e4m3fn)
    return stored, scales, stored.float() * scales


def fp8_tensor(weight):
    scale = weight.float().abs().max() / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    return stored, scale.reshape(1), stored.float() * scale


def compressed(strategy: str) -> dict:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


@pytest.mark.parametrize(
    "quantise, suffix, config",
    [
        (fp8_blocks, "_scale_inv", BLOCKS),
        (fp8_channels, "_scale", compressed("channel")),
        (fp8_tensor, "_scale", compressed("tensor")),
    ],
)
def test_an_fp8_folder_gives_the_logits_of_its_numbers(
    quantise, suffix, config, tmp_path
):
    plain, folder = tmp_path / "plain", tmp_path / "fp8"
    make(transformers.Qwen3Config(**SIZES, head_dim=64), plain, torch.bfloat16)
    shutil.copytree(plain, folder)
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            continue
        stored[name], stored[name + suffix], numbers = quantise(weight)
        tensors[name] = numbers.to(torch.bfloat16)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    respell(folder, lambda c: c.update(quantization_config=config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32
    ).eval()
    assert_logits(folder, theirs)



@pytest.fixture
def with_attn_factor(tmp_path):
    """A yarn model whose attn_factor makes the product 1."""
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "attn_factor": 0.8782488562869419,
    }
    make(transformers.Qwen3Config(**SIZES, head_dim=64), tmp_path)
    respell(tmp_path, lambda c: c.update(rope_parameters=rope))
    return tmp_path


def test_the_bridge_refuses_an_attn_factor_that_transformers_ignores(with_attn_factor):
    from pbs_client import Client, hf

    model = hf.load_model(with_attn_factor, dtype="f32")
    prompt = list(range(2, 52))
    advice = "models\\[\\].yarn_attn_factor ignored"
    with running_server(f"--model=m={with_attn_factor}") as server:
        client = Client(server.target)
        (info,) = client.models()
        assert info.rope_attention_factor == pytest.approx(1.0)
        with pytest.raises(hf.IncompatibleCacheError, match=advice):
            hf.check_same_model(model, info)
        reply = client.prefill("m", prompt, delivery="inline")
        with pytest.raises(hf.IncompatibleCacheError, match=advice):
            hf.generate(model, prompt, reply.kv, max_new_tokens=4)
        client.close()


def test_an_ignored_attn_factor_decodes_as_transformers_does(
    with_attn_factor, tmp_path_factory
):
    from pbs_client import Client, Dense, hf

    model = hf.load_model(with_attn_factor, dtype="f32")
    prompt = list(range(2, 52))
    config = tmp_path_factory.mktemp("config") / "server.json"
    source = {"name": "m", "path": str(with_attn_factor), "yarn_attn_factor": "ignored"}
    config.write_text(json.dumps({"models": [source]}))
    with torch.no_grad():
        own = model.generate(
            torch.tensor([prompt]), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    with running_server(f"--config={config}") as server:
        client = Client(server.target)
        hf.check_same_model(model, *client.models())
        reply = client.prefill("m", prompt, Dense(), delivery="inline")
        tokens = hf.generate(model, prompt, reply.kv, max_new_tokens=4, ignore_eos=True)
        client.close()
    assert tokens == own[0, 50:].tolist()
