"""Tiny random models in Hugging Face form; needs torch and transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

# name -> (family, tied embeddings, head_dim, rotary embedding)
MODELS = {
    "llama, llama3 rope": ("Llama", False, 64, _LLAMA3),
    "qwen2, biases, yarn, tied": ("Qwen2", True, 32, _YARN),
    "qwen3, qk norm": ("Qwen3", False, 64, _PLAIN),
}


def make(name: str, folder: Path, seed: int = 7) -> Path:
    """Writes the model `name`, in f32, as this transformers release spells configs."""
    family, tied, head_dim, rope = MODELS[name]
    config_class = getattr(transformers, f"{family}Config")
    fields = {**_SIZES, "tie_word_embeddings": tied}
    if family != "Qwen2":  # its heads are hidden_size / heads wide
        fields["head_dim"] = head_dim
    if int(transformers.__version__.split(".")[0]) >= 5:
        fields["rope_parameters"] = dict(rope)
    else:
        fields["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            fields["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**fields))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # They start at 0 and 1: a reader that ignores them would pass.
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.5)
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder
