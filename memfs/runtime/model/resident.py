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

from memfs.config import Config
from memfs.cube.fingerprint import FORMAT
from memfs.errors import ModelUnusable
from memfs.runtime.model import attention
from memfs.runtime.model.engine import PREFILL_CHUNK, Engine
from memfs.runtime.model.families import context_of, layer_types, require_servable
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
    """Tokens it serves, all in."""
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
        require_servable(settings)
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
    prompt = Prompt.of(tokenizer)
    engine, packs = _with_our_attention(model, prompt, dtype, device)
    preamble = engine.new_cache(max(1, len(prompt.preamble)))
    if prompt.preamble:
        engine.forward(preamble, prompt.preamble, logits=False)
    context = context_of(settings)
    return Resident(
        name=directory.name,
        engine=engine,
        prompt=prompt,
        fingerprint=_fingerprint(directory, model, engine.shape, prompt),
        context=context,
        stop=_stop_tokens(model, tokenizer),
        inv_freq=inverse_frequencies(model),
        unplaceable=unplaceable(model, engine.shape, layer_types(settings), context),
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


def _kv_shape(cache: object, dtype: torch.dtype, device: torch.device) -> KVShape:
    """What the model really keeps of each token, from a cache that it filled."""
    layers = getattr(cache, "layers", None)
    if not layers:
        raise ModelUnusable("it keeps no KV cache")
    shapes = {tuple(t.shape[1::2]) for layer in layers for t in (layer.keys, layer.values)}
    if len(shapes) > 1:
        raise ModelUnusable("its keys and values are not all of one shape, as memfs keeps them")
    ((kv_heads, head_dim),) = shapes
    return KVShape(len(layers), kv_heads, head_dim, dtype, device)


def _with_our_attention(
    model: PreTrainedModel, prompt: Prompt, dtype: torch.dtype, device: torch.device
) -> tuple[Engine, bool]:
    """Switches the model to our attention over our cache, after seeing that it says the same.

    Returns its engine, and whether it says the same too where a forward takes several sequences.
    Raises ModelUnusable where it does not for one: something in its attention is not what it seems.
    """
    ids = prompt.question("What is the answer?", bare=True)
    half = len(ids) // 2
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    try:
        with torch.inference_mode():
            own = model(input_ids=torch.tensor([ids], device=device), use_cache=True)
        expected = own.logits[0, -1].float()
        engine = Engine(model, _kv_shape(own.past_key_values, dtype, device))
        model.set_attn_implementation(attention.NAME)

        def begun() -> KVCache:
            cache = engine.new_cache(len(ids))
            engine.forward(cache, ids[:half], logits=False)
            return cache

        def agrees(found: torch.Tensor | None) -> bool:
            assert found is not None
            return bool((found - expected).norm() <= tolerance * expected.norm())

        if not agrees(engine.forward(begun(), ids[half:])):
            raise ModelUnusable("over a KV cache it does not say what it says without one")
    except (RuntimeError, TypeError, ValueError, AttributeError) as e:
        raise ModelUnusable(f"it does not run over a KV cache of ours: {_first_line(e)}") from e
    try:
        found = engine.together([begun(), begun()], [ids[half:-1], ids[half:]])
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return engine, False  # it looks into keys and values before it attends to them
    return engine, agrees(found[1])


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
        "layer_types": json.dumps(layer_types(settings)),
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
