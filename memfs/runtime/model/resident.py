"""The resident model: loading it, refusing one that cannot serve, and saying exactly what it is.

``load`` is called once, in the daemon's model thread. What it returns is used from that thread, but
for its plain facts.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from memfs.config import Config
from memfs.cube.fingerprint import FORMAT
from memfs.errors import ModelUnusable
from memfs.runtime.model import attention
from memfs.runtime.model.engine import PREFILL_CHUNK, Engine
from memfs.runtime.model.kv_cache import KVCache, KVShape
from memfs.runtime.model.model_digest import tokenizer_digest, weights_digest
from memfs.runtime.model.prompt import Prompt
from memfs.runtime.model.rotary import inverse_frequencies, unplaceable


@dataclass(frozen=True)
class Resident:
    """A model that serves, and the facts about it."""

    name: str
    engine: Engine
    prompt: Prompt
    fingerprint: dict[str, str]
    """The model's part of a KV cache's fingerprint."""
    context: int
    """Tokens the model was made for, all in."""
    stop: frozenset[int]
    inv_freq: torch.Tensor | None
    unplaceable: str | None
    """Why several cubes cannot be placed one after another; None where they can."""
    packs: bool
    """Whether one forward may take several sequences, or rows out of their order."""
    preamble: KVCache
    """The rows of the preamble, computed once."""

    @property
    def shape(self) -> KVShape:
        """Of its KV cache."""
        return self.engine.shape

    @property
    def base(self) -> int:
        """Position of a memory's first row."""
        return self.preamble.length


def load(directory: Path, config: Config) -> Resident:
    """The model in a directory, ready to serve. Raises ModelUnusable with the reason."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    try:
        settings = AutoConfig.from_pretrained(directory, local_files_only=True)
        _require_causal(settings)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            config=settings,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,  # a pickle is never opened
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as e:
        raise ModelUnusable(f"{directory}: {_first_line(e)}") from e
    model.to(device)  # type: ignore[arg-type]  # its stub knows no device
    model.eval().requires_grad_(False)
    shape = _kv_shape(model, dtype, device)
    prompt = Prompt.of(tokenizer)
    engine = Engine(model, shape)
    packs = _use_our_attention(engine, prompt)
    preamble = engine.new_cache(max(1, len(prompt.preamble)))
    if prompt.preamble:
        engine.forward(preamble, prompt.preamble, logits=False)
    kinds = _layer_types(settings)
    return Resident(
        name=directory.name,
        engine=engine,
        prompt=prompt,
        fingerprint=_fingerprint(directory, model, shape, prompt),
        context=int(settings.max_position_embeddings),
        stop=_stop_tokens(model, tokenizer),
        inv_freq=inverse_frequencies(model),
        unplaceable=unplaceable(model, shape, kinds),
        packs=packs,
        preamble=preamble,
    )


def choose_device(wanted: str) -> torch.device:
    """The device of a configuration; ``auto`` takes an accelerator where there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as e:
        raise ModelUnusable(f"device {wanted!r}: {_first_line(e)}") from e
    if device.type not in ("cpu", "cuda"):
        raise ModelUnusable(f"device {wanted!r}: memfs runs on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelUnusable(f"device {wanted!r}: torch finds no accelerator here")
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of a configuration. ``auto`` is bfloat16 where the device computes in it.

    On a CPU that is told by its flags: with AVX512_BF16 or AMX bfloat16 prefills 1.7 times faster
    than float32, without them it is far slower.
    """
    if wanted == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    dtypes = {
        str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)
    }
    if wanted not in dtypes:
        raise ModelUnusable(f"dtype {wanted!r}: one of auto, {', '.join(dtypes)}")
    return dtypes[wanted]


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _require_causal(settings: object) -> None:
    """Raises ModelUnusable where a configuration is not of a causal model with plain attention."""
    kind = getattr(settings, "model_type", None)
    if getattr(settings, "is_encoder_decoder", False) or (
        kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        raise ModelUnusable(f"{kind} is not a causal language model")
    architectures = getattr(settings, "architectures", None) or []
    if architectures and not any("CausalLM" in a or "LMHead" in a for a in architectures):
        raise ModelUnusable(f"{architectures[0]} is not a causal language model")
    odd = set(_layer_types(settings)) - {"full_attention", "sliding_attention"}
    if odd:
        raise ModelUnusable(f"it has layers of {', '.join(sorted(odd))}, which keep no KV cache")
    if not getattr(settings, "max_position_embeddings", None):
        raise ModelUnusable("its configuration does not say how long a context it takes")


def _layer_types(settings: object) -> list[str]:
    """The kind of attention of each layer."""
    found = getattr(settings, "layer_types", None)
    if found:
        return list(found)
    kind = "sliding_attention" if getattr(settings, "sliding_window", None) else "full_attention"
    return [kind] * int(getattr(settings, "num_hidden_layers", 0))


def _kv_shape(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> KVShape:
    settings = model.config
    heads = int(settings.num_attention_heads)
    return KVShape(
        layers=int(settings.num_hidden_layers),
        kv_heads=int(getattr(settings, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(settings, "head_dim", None) or settings.hidden_size // heads),
        dtype=dtype,
        device=device,
    )


def _use_our_attention(engine: Engine, prompt: Prompt) -> bool:
    """Switches the model to our attention over our cache, after seeing that it says the same.

    Returns whether it does so too where a forward takes several sequences. Raises ModelUnusable
    where it does not for one: something in the model's attention is not what it seems.
    """
    model = engine.model
    ids = prompt.question("What is the answer?", bare=True)
    with torch.inference_mode():
        rows = torch.tensor([ids], device=engine.shape.device)
        expected = model(input_ids=rows, use_cache=False).logits[0, -1].float()
    model.set_attn_implementation(attention.NAME)
    half = len(ids) // 2
    tolerance = 1e-3 if engine.shape.dtype == torch.float32 else 0.1

    def begun() -> KVCache:
        cache = engine.new_cache(len(ids))
        engine.forward(cache, ids[:half], logits=False)
        return cache

    def agrees(found: torch.Tensor | None) -> bool:
        assert found is not None
        return bool((found - expected).norm() <= tolerance * expected.norm())

    try:
        if not agrees(engine.forward(begun(), ids[half:])):
            raise ModelUnusable("over a KV cache it does not say what it says without one")
    except (RuntimeError, TypeError, ValueError, AttributeError) as e:
        raise ModelUnusable(f"it does not run over a KV cache of ours: {_first_line(e)}") from e
    try:
        found = engine.together([begun(), begun()], [ids[half:-1], ids[half:]])
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it looks into keys and values before it attends to them
    return agrees(found[1])


def _stop_tokens(model: PreTrainedModel, tokenizer: object) -> frozenset[int]:
    """Every token that ends an answer: the generation configuration's and the tokenizer's."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        eos = getattr(source, "eos_token_id", None)
        found.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset(found)


def _fingerprint(
    directory: Path, model: PreTrainedModel, shape: KVShape, prompt: Prompt
) -> dict[str, str]:
    settings = model.config
    inv_freq = inverse_frequencies(model)
    quantization = getattr(settings, "quantization_config", None)
    rope = getattr(settings, "rope_parameters", None)
    return {
        "format": FORMAT,
        "weights_sha256": weights_digest(directory),
        "architecture": type(model).__name__,
        "layers": str(shape.layers),
        "kv_heads": str(shape.kv_heads),
        "head_dim": str(shape.head_dim),
        "layer_types": json.dumps(_layer_types(settings)),
        "sliding_window": str(getattr(settings, "sliding_window", None) or "none"),
        "rope": json.dumps(rope, sort_keys=True, default=str),
        "inv_freq_sha256": "none"
        if inv_freq is None
        else _sha256(inv_freq.cpu().numpy().tobytes()),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "quantization": "none" if quantization is None else json.dumps(quantization, default=str),
        "tokenizer_sha256": tokenizer_digest(directory),
        "chat_template_sha256": _sha256(str(prompt.tokenizer.chat_template).encode()),
        "preamble_sha256": ids_digest(prompt.preamble),
        "base_position": str(len(prompt.preamble)),
        "prefill_chunk": str(PREFILL_CHUNK),
        "adapter": "base",
    }


def ids_digest(ids: Sequence[int]) -> str:
    """SHA-256 of token ids as little-endian int32."""
    return _sha256(struct.pack(f"<{len(ids)}i", *ids))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
