"""What the server reads in config.json, beside what transformers reads in it.

Runs build/tests/config_dump on the configs of published models, and on small ones that
leave out each key for which transformers has a default.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess

import pytest

transformers = pytest.importorskip("transformers", reason="a peer")
pytest.importorskip("torch", reason="a peer")

pytestmark = pytest.mark.peers

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENS_MAX = 1 << 20  # kSeqLenMax


def described(tmp_path: pathlib.Path, config: dict) -> dict:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    binaries = pathlib.Path(os.environ.get("PBS_BIN", ROOT / "build/bin"))
    command = [binaries.parent / "tests/config_dump", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def read_by_transformers(tmp_path: pathlib.Path, config: dict):
    """The text config, and the rotary frequencies and factor that it means."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    head_dim = getattr(theirs, "head_dim", None)
    head_dim = head_dim or theirs.hidden_size // theirs.num_attention_heads
    kind = theirs.rope_parameters["rope_type"]
    functions = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
    if kind in functions:
        frequencies, factor = functions[kind](theirs, "cpu")
        return theirs, head_dim, frequencies.tolist(), factor
    theta = theirs.rope_parameters["rope_theta"]
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    return theirs, head_dim, plain, 1.0


def assert_equal(ours: dict, tmp_path: pathlib.Path, config: dict) -> None:
    theirs, head_dim, frequencies, factor = read_by_transformers(tmp_path, config)
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "tie_word_embeddings",
    ):
        assert ours[key] == getattr(theirs, key), key
    assert ours["head_dim"] == head_dim
    assert ours["rms_norm_eps"] == pytest.approx(theirs.rms_norm_eps, rel=1e-6)
    assert ours["inverse_frequencies"] == pytest.approx(frequencies, rel=1e-5)
    assert ours["attention_factor"] == pytest.approx(factor, rel=1e-6)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 64},
}
LEFT_OUT = [
    (family, key)
    for family, config in FAMILIES.items()
    for key in config
    if key != "model_type"
]


@pytest.mark.parametrize("family, key", LEFT_OUT)
def test_a_key_that_is_left_out_has_transformers_default(family, key, tmp_path):
    config = dict(FAMILIES[family])
    del config[key]
    ours = described(tmp_path, config)
    assert "error" not in ours, ours
    assert_equal(ours, tmp_path, config)
    if key == "max_position_embeddings":
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert ours["tokens_max"] == theirs.max_position_embeddings
    if key == "sliding_window":
        assert ours["tokens_max"] == 4096
    assert any(f"{key} is missing" in note for note in ours["notes"]), ours["notes"]


def model(kind: str, sizes: str, **rest) -> dict:
    """Layers, width, inner width, query heads, KV heads, vocabulary, positions."""
    keys = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    return {"model_type": kind, **dict(zip(keys, map(int, sizes.split()))), **rest}


LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
FP8_BLOCKS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
FP8_DYNAMIC = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
MISTRAL = "32 4096 14336 32 8 32000 32768"
# The settings that published folders have, in the spelling in which they have them, and
# how many tokens are served of each.
PUBLISHED = {
    "Llama-2-7b": (
        model("llama", "32 4096 11008 32 32 32000 4096", rms_norm_eps=1e-5, rope_scaling=None),
        4096,
    ),
    "Llama-2-70b": (model("llama", "80 8192 28672 64 8 32000 4096", rms_norm_eps=1e-5), 4096),
    "Llama-3.1-8B": (
        model(
            "llama",
            "32 4096 14336 32 8 128256 131072",
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=LLAMA3_ROPE,
        ),
        131072,
    ),
    "Llama-3.2-1B": (
        model(
            "llama",
            "16 2048 8192 32 8 128256 131072",
            head_dim=64,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=LLAMA3_ROPE | {"factor": 32.0},
            tie_word_embeddings=True,
        ),
        131072,
    ),
    "Llama-3.1-8B-Instruct-FP8-dynamic": (
        model(
            "llama",
            "32 4096 14336 32 8 128256 131072",
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=LLAMA3_ROPE,
            quantization_config=FP8_DYNAMIC,
        ),
        131072,
    ),
    "Mistral-7B-v0.1": (
        model("mistral", MISTRAL, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096),
        4096,
    ),
    "zephyr-7b-beta": (
        model(
            "mistral",
            MISTRAL,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            sliding_window=4096,
            pad_token_id=2,
        ),
        4096,
    ),
    "Mistral-7B-Instruct-v0.2": (
        model("mistral", MISTRAL, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None),
        32768,
    ),
    "Mistral-Nemo": (
        model(
            "mistral",
            "40 5120 14336 32 8 131072 131072",
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            sliding_window=None,
        ),
        131072,
    ),
    "Mistral-Small-3.1, its text part": (
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "text_config": model(
                "mistral",
                "40 5120 32768 32 8 131072 131072",
                head_dim=128,
                rms_norm_eps=1e-5,
                rope_theta=1e9,
                sliding_window=None,
            ),
            "vision_config": {"model_type": "pixtral"},
        },
        131072,
    ),
    "llava-1.5-7b, its text part": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": {
                "model_type": "llama",
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "vocab_size": 32064,
            },
            "vision_config": {"model_type": "clip_vision_model"},
        },
        4096,
    ),
    "Qwen2.5-0.5B": (
        model(
            "qwen2",
            "24 896 4864 14 2 151936 32768",
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            sliding_window=32768,
            use_sliding_window=False,
            max_window_layers=24,
            tie_word_embeddings=True,
        ),
        32768,
    ),
    "Qwen2.5-7B-Instruct-1M": (
        model(
            "qwen2",
            "28 3584 18944 28 4 152064 1010000",
            rms_norm_eps=1e-5,
            rope_theta=1e7,
            use_sliding_window=False,
            dual_chunk_attention_config={
                "chunk_size": 262144,
                "local_size": 8192,
                "original_max_position_embeddings": 262144,
            },
        ),
        253952,
    ),
    "Qwen2.5 with yarn, as its page says": (
        model(
            "qwen2",
            "28 3584 18944 28 4 152064 32768",
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            rope_scaling={
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
        ),
        131072,
    ),
    "Qwen3-8B": (
        model(
            "qwen3",
            "36 4096 12288 32 8 151936 40960",
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            rope_scaling=None,
            use_sliding_window=False,
        ),
        40960,
    ),
    "Qwen3-8B-FP8": (
        model(
            "qwen3",
            "36 4096 12288 32 8 151936 40960",
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            quantization_config=FP8_BLOCKS,
        ),
        40960,
    ),
    "Yarn-Llama-2-7b-64k": (
        model(
            "llama",
            "32 4096 11008 32 32 32000 65536",
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            rope_scaling={
                "factor": 16.0,
                "finetuned": True,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
        ),
        65536,
    ),
    "yarn without its original length": (
        model(
            "qwen2",
            "28 3584 18944 28 4 152064 32768",
            rope_theta=1e6,
            rope_scaling={"factor": 4.0, "rope_type": "yarn"},
        ),
        131072,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_means_what_transformers_reads(name, tmp_path):
    config, tokens_max = PUBLISHED[name]
    ours = described(tmp_path, config)
    assert "error" not in ours, ours
    assert_equal(ours, tmp_path, config)
    assert ours["tokens_max"] == tokens_max


def test_an_attn_factor_is_what_sets_the_two_decode_tiers_apart(tmp_path):
    # DeepSeek-R1-0528-Qwen3-8B: vLLM computes 1, transformers 1.1386.
    config = model(
        "qwen3",
        "36 4096 12288 32 8 151936 131072",
        head_dim=128,
        rope_theta=1e6,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "attn_factor": 0.8782488562869419,
        },
    )
    ours = described(tmp_path, config)
    *_, factor = read_by_transformers(tmp_path, config)
    assert ours["attention_factor"] == pytest.approx(1.0, rel=1e-12)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
