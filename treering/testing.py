"""A tiny random model with a byte tokenizer, for tests: ours, and those of anyone who builds on treering.

It has the whole shape of a real chat model and trains in milliseconds; what it writes is noise until it is taught.
"""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(folder: Path, *, hidden_size: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """Write a two-layer Llama (about 90,000 weights, float32) and its tokenizer into `folder`; returns `folder`."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.2,  # Wider than usual, so that adapters on these random weights can learn.
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # No pad_token_id: it is the end mark, and a padding token's weights begin at zero, so adapters never learn it.
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def toy_rows(task: str, count: int = 40, labels: int = 4) -> list[dict[str, str]]:
    """`count` text and label rows of `task`, `labels` labels in turn, that even the tiny model can learn."""
    return [
        {
            "text": f"{task} item {number}: sort {chr(97 + number % labels)}",
            "label": f"{task} {chr(97 + number % labels)}",
        }
        for number in range(count)
    ]
