"""Small models with random weights, and the default model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def llama(directory: Path, tokenizer_from: Path) -> Path:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes(tokenizer_from, layers=2, heads=4, kv_heads=2, head_dim=16))
    return saved(LlamaForCausalLM, config, tokenizer_from, directory)


def qwen3(directory: Path, tokenizer_from: Path) -> Path:
    """A Qwen3 of three layers: norms on queries and keys, heads wider than hidden / heads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**sizes(tokenizer_from, layers=3, heads=6, kv_heads=3, head_dim=32))
    return saved(Qwen3ForCausalLM, config, tokenizer_from, directory)


def sizes(
    tokenizer_from: Path, *, layers: int, heads: int, kv_heads: int, head_dim: int
) -> dict[str, Any]:
    """What the configuration of a small model says."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(tokenizer_from)
    return {
        "vocab_size": whole.vocab_size,
        "bos_token_id": whole.bos_token_id,
        "eos_token_id": whole.eos_token_id,
        "pad_token_id": whole.pad_token_id,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        # Wide enough that two greedy tokens are never a rounding error apart.
        "initializer_range": 0.2,
    }


def saved(model_class: type, config: object, tokenizer_from: Path, directory: Path) -> Path:
    """A model with random weights, the same each time, saved in ``directory``."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config).save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_from / name, directory)
    return directory
