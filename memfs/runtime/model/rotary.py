"""Rotary positions: moving keys to other positions than they were made at, and who allows it.

``unplaceable`` is asked once, when a model is loaded; ``rotated`` for every memory that is placed.
Runs in the model's thread.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from memfs.runtime.model.families import SLIDING
from memfs.runtime.model.kv_cache import KVCache, KVShape, Slot, for_model

PROBE_DISTANCE = 1021
"""How far ``unplaceable`` moves its probe, if the context is that long: no multiple of a period."""


def rotated(
    keys: torch.Tensor, distance: int | torch.Tensor, inv_freq: torch.Tensor
) -> torch.Tensor:
    """Keys [..., rows, head_dim] moved by ``distance`` positions (rotary embedding in halves): all
    by the same, or each row by its own, [rows, 1].

    A model whose attention scales cos and sin keeps that scale: it is in the keys already.
    """
    half = inv_freq.shape[0]
    angle = distance * inv_freq.to(torch.float64)  # float32 loses the angle at long distances
    cos, sin = angle.cos().float(), angle.sin().float()
    moved = keys.float()
    first, second = moved[..., :half], moved[..., half : 2 * half]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned, moved[..., 2 * half :]), dim=-1).to(keys.dtype)


def inverse_frequencies(model: PreTrainedModel) -> torch.Tensor | None:
    """The frequencies the model really uses, float32; None where it has no rotary embedding."""
    found = getattr(getattr(model.base_model, "rotary_emb", None), "inv_freq", None)
    return found.detach().float() if isinstance(found, torch.Tensor) else None


def unplaceable(
    model: PreTrainedModel, shape: KVShape, layer_types: list[str], context: int
) -> str | None:
    """Why this model's rows cannot be placed elsewhere in its context; None where they can.

    The configuration tells most; the rest is tried. A lone token attends to itself alone, so its
    keys depend on its position only, in every layer: those made far away must be those made at 0,
    rotated. That finds layers without rotary embedding, interleaved pairs, and what is to come.
    """
    if SLIDING in layer_types:
        return "it has sliding-window layers"
    if getattr(model.config, "alibi", False):
        return "its positions are biases of the attention (ALiBi)"
    inv_freq = inverse_frequencies(model)
    if inv_freq is None:
        return "it has no rotary embedding: its positions are learned"
    if 2 * inv_freq.shape[0] > shape.head_dim:
        return "its rotary embedding is wider than its heads"
    distance = min(PROBE_DISTANCE, context - 1)
    near, far = (_lone_token_keys(model, shape, at) for at in (0, distance))
    tolerance = 0.02 if shape.dtype == torch.float32 else 0.06
    for layer, (here, there) in enumerate(zip(near, far, strict=True)):
        moved = rotated(here, distance, inv_freq).float()
        if (moved - there.float()).norm() > tolerance * there.float().norm():
            return f"the keys of layer {layer} are not rotated in halves"
    return None


def _lone_token_keys(model: PreTrainedModel, shape: KVShape, position: int) -> list[torch.Tensor]:
    """The keys of one token at ``position``, [kv_heads, 1, head_dim] a layer."""
    cache = KVCache(shape, 1)
    with torch.inference_mode():
        model.base_model(
            input_ids=torch.tensor([[7]], device=shape.device),
            position_ids=torch.tensor([[position]], device=shape.device),
            past_key_values=for_model([Slot(cache, 1)]),
            use_cache=True,
        )
    return [layer[0] for layer in cache.layers]
