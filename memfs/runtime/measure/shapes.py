"""Models that have the shape of a published one and random weights, made for a bench.

Times do not depend on what the weights are. Used by ``memfs bench ttft --shape``, in its process;
what is made is an ordinary model directory. torch is imported when one is made: the command only
wants to know their names before.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memfs.config import Config
from memfs.errors import ModelUnusable

if TYPE_CHECKING:
    import torch

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
}
"""As their configurations say, by the names that ``--shape`` takes."""

_SPARE = 1.25
"""Times its weights is what a model needs: caches, what a forward computes, the runtime itself."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make(name: str, directory: Path, tokenizer_from: Path, config: Config) -> None:
    """Writes a model of this shape into ``directory``, which is there and empty.

    Args:
        tokenizer_from: the model directory whose tokenizer and chat template it gets.
        config: says where it is to run and in what dtype.

    Raises:
        ModelUnusable: the device or the disk has not the room for it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers import logging as transformers_logging

    from memfs.runtime.model.resident import choose_device, choose_dtype

    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    described = AutoConfig.from_pretrained(tokenizer_from, local_files_only=True)
    settings = AutoConfig.for_model(
        **SHAPES[name],
        **{key: getattr(described, key) for key in ("bos_token_id", "eos_token_id")},
    )
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(settings).parameters())
    _require_room(name, count * dtype.itemsize, device, directory)
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory)
    for file in _TOKENIZER_FILES:
        shutil.copy(tokenizer_from / file, directory)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()  # it is the runtime's now


def _require_room(name: str, nbytes: int, device: torch.device, directory: Path) -> None:
    """Raises ModelUnusable, naming what is short of memory or disk for so many bytes of weights."""
    if device.type == "cuda":
        import torch

        free = torch.cuda.mem_get_info(device)[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10
    disk = shutil.disk_usage(directory).free
    for place, there, needed in (
        (f"{device} memory", free, nbytes * _SPARE),
        (f"space in {directory.parent}", disk, nbytes),
    ):
        if there < needed:
            raise ModelUnusable(
                f"a model of the shape {name} has {nbytes / 1e9:.1f} GB of weights and needs "
                f"{needed / 1e9:.1f} GB of {place}; {there / 1e9:.1f} GB are free"
            )
