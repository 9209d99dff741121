"""A tokenizer of whole words for the tiny models: word N is the token N + 2."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # tokens 0, 1 and the last
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} stop {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make(folder: Path, vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Writes the tokenizer into a folder, and returns it.

    Not a model's folder: by its config.json, transformers 5 may take another class.
    """
    words = ["user", "assistant", "stop", "question", "answer", "yes", "no"]
    words += [f"w{index}" for index in range(vocab_size - 3 - len(words))]
    vocab = {word: index for index, word in enumerate([BOS, EOS, *words, PAD])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    made.save_pretrained(folder)
    return made
