#!/usr/bin/env python3
"""Trains the bundled model, tests/data/recall-llama, again.

    python tests/quality/train_recall_model.py --out build/recall-llama

A two-layer Llama with attention biases learns associative recall
(tests/quality/recall_task.py) on a CPU in a few minutes, by a curriculum of growing
prompts. Associative recall is learnt late and suddenly, so the circuit that solves it is
placed at initialisation and then trained with everything else:

  layer 0, KV head 0  attends to the previous token (by query and key biases only) and
                      writes its embedding into the residual stream
  layer 1, KV head 0  matches the query token's embedding against that, on the slow
                      rotary pairs, and copies the matched token to the output

Needs torch and transformers. Seeded, but bits differ between machines.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import recall_task
import torch
import transformers

HEAD_DIM = 64
ROPE_THETA = 1e6
# (length, pairs, questions), easy to hard.
STAGES = [
    (64, 12, 6),
    (128, 24, 12),
    (256, 32, 16),
    (512, 64, 32),
    (1024, 64, 32),
    (2048, 96, 32),
    (4096, 96, 32),
]
PASS_ACCURACY = 0.9  # moving average that opens the next stage
TOKENS_PER_STEP = 4096
LEARNING_RATE = 1e-3
WARMUP_STEPS = 100


def build_model() -> transformers.LlamaForCausalLM:
    """An untrained model with the recall circuit placed."""
    config = transformers.LlamaConfig(
        vocab_size=recall_task.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        initializer_range=0.08,
        rms_norm_eps=1e-6,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=recall_task.BOS,
        eos_token_id=recall_task.EOS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    model = transformers.LlamaForCausalLM._from_config(
        config, attn_implementation="sdpa"
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.2)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.normal_(0, 0.01)
            layer.self_attn.o_proj.bias.zero_()
            layer.mlp.down_proj.weight.normal_(0, 0.01)
        place_previous_token_head(model.model.layers[0].self_attn)
        place_matching_head(*(layer.self_attn for layer in model.model.layers))
    return model


def place_previous_token_head(attention: torch.nn.Module, strength: float = 6.0) -> None:
    """Biases whose rotary phases agree at a distance of one token."""
    half = HEAD_DIM // 2
    frequency = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    attention.k_proj.bias[:half] = strength
    attention.k_proj.bias[half:HEAD_DIM] = 0
    for head in range(2):  # the query heads of KV head 0
        begin = head * HEAD_DIM
        attention.q_proj.bias[begin : begin + half] = strength * frequency.cos()
        attention.q_proj.bias[begin + half : begin + HEAD_DIM] = (
            -strength * frequency.sin()
        )


def place_matching_head(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """Layer 0 writes a projection of the previous token, layer 1 matches and copies."""
    hidden = first.v_proj.weight.shape[1]
    slow = [*range(16, 32), *range(48, 64)]  # rotary pairs that barely turn
    read = torch.linalg.qr(torch.randn(hidden, 32))[0].T
    write = torch.linalg.qr(torch.randn(hidden, 32))[0]
    copy = torch.linalg.qr(torch.randn(hidden, HEAD_DIM))[0].T
    first.v_proj.weight[:32] = read
    first.o_proj.weight[:, :32] = 0.4 * write
    second.q_proj.weight[:HEAD_DIM] = 0
    second.k_proj.weight[:HEAD_DIM] = 0
    second.q_proj.weight[slow] = 2.0 * read
    second.k_proj.weight[slow] = 2.0 * write.T
    second.v_proj.weight[:HEAD_DIM] = copy
    second.o_proj.weight[:, :HEAD_DIM] = copy.T


def loss_and_accuracy(
    model: transformers.LlamaForCausalLM, prompts: recall_task.Prompts
) -> tuple[torch.Tensor, float]:
    """Cross entropy and share of right answers at the asked positions."""
    tokens = torch.from_numpy(prompts.tokens)
    hidden = model.model(input_ids=tokens).last_hidden_state
    logits = model.lm_head(hidden[:, torch.from_numpy(prompts.asked)])
    answers = torch.from_numpy(prompts.answers)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
    return loss, (logits.argmax(-1) == answers).float().mean().item()


def train(
    model: transformers.LlamaForCausalLM, steps: int, rng: np.random.Generator
) -> None:
    """Runs the curriculum for `steps` steps, printing progress."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    stage, average, started = 0, 0.0, time.monotonic()
    for step in range(steps):
        revisit = stage > 0 and step % 4 == 0
        length, pairs, questions = STAGES[rng.integers(stage) if revisit else stage]
        pairs = int(rng.integers(max(questions, pairs // 2), pairs + 1))
        batch = max(1, TOKENS_PER_STEP // length)
        decay = 0.05 + 0.95 * (1 - max(0.0, (step / steps - 0.5) / 0.5))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * decay
        loss, accuracy = loss_and_accuracy(
            model, recall_task.make_prompts(rng, batch, length, pairs, questions)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if length == STAGES[stage][0]:
            average = 0.95 * average + 0.05 * accuracy
            if average > PASS_ACCURACY and stage + 1 < len(STAGES):
                stage, average = stage + 1, 0.0
        if step % 50 == 0 or step + 1 == steps:
            print(
                f"step {step} of {steps}, {time.monotonic() - started:.0f} s: "
                f"length {length}, loss {loss.item():.3f}, accuracy {accuracy:.3f}",
                flush=True,
            )


@torch.no_grad()
def evaluate(model: transformers.LlamaForCausalLM, seed: int) -> dict[int, float]:
    """Share of right answers by prompt length, 16 prompts each."""
    rng = np.random.default_rng(seed)
    accuracy = {}
    for length, pairs, questions in [*STAGES, (8192, 96, 32)]:
        batch = max(1, min(16, 16384 // length))
        shares = [
            loss_and_accuracy(
                model, recall_task.make_prompts(rng, batch, length, pairs, questions)
            )[1]
            for _ in range(16 // batch)
        ]
        accuracy[length] = round(float(np.mean(shares)), 4)
    return accuracy


def main() -> None:
    """Trains, saves in bf16, evaluates what was saved in f32."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    model = build_model()
    train(model, arguments.steps, np.random.default_rng(arguments.seed))
    model = model.eval().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(arguments.out)
    saved = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.out, dtype=torch.float32
    ).eval()
    print(json.dumps({"accuracy_by_length": evaluate(saved, seed=12345)}))


if __name__ == "__main__":
    main()
