"""Which models can serve, and how far: told from a configuration, before any weight is read.

``resident.load`` asks. Pure functions, any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from memfs.errors import ModelUnusable

FULL, SLIDING = "full_attention", "sliding_attention"


def require_servable(settings: PreTrainedConfig) -> None:
    """Raises ModelUnusable, with the reason, where no KV cache can stand for what was read."""
    kind = settings.model_type
    if getattr(settings, "is_encoder_decoder", False) or (
        kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        raise ModelUnusable(f"{kind} is not a causal language model")
    architectures = settings.architectures or []
    if architectures and not any("CausalLM" in a or "LMHead" in a for a in architectures):
        raise ModelUnusable(f"{architectures[0]} is not a causal language model")
    odd = set(layer_types(settings)) - {FULL, SLIDING}
    if odd:
        raise ModelUnusable(
            f"it has layers of {', '.join(sorted(odd))}; memfs serves {FULL} and {SLIDING}, "
            "whose memory is a row of keys and values for each token"
        )
    model = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)])
    if model._is_stateful:
        raise ModelUnusable(f"{kind} keeps a running state, and no KV cache")
    if not model._supports_sdpa:
        raise ModelUnusable(
            f"the attention of {kind} is not plain scaled dot-product attention "
            "(transformers has no sdpa for it)"
        )
    if not getattr(settings, "max_position_embeddings", None):
        raise ModelUnusable("its configuration does not say how long a context it takes")


def layer_types(settings: PreTrainedConfig) -> list[str]:
    """The kind of attention of each layer."""
    found = getattr(settings, "layer_types", None)
    if found:
        return list(found)
    kind = SLIDING if getattr(settings, "sliding_window", None) else FULL
    return [kind] * int(getattr(settings, "num_hidden_layers", 0))


def context_of(settings: PreTrainedConfig) -> int:
    """Tokens that a model serves, all in.

    What it was made for; but where its rotary embedding changes with the length (longrope beyond
    its original context; dynamic beyond ``max_position_embeddings``), only as long as it has not
    changed: rows made before are then no longer what a prefill of the whole gives.
    """
    lengths = [int(settings.max_position_embeddings)]
    for rope in _rotary_parameters(settings):
        if rope.get("rope_type") == "longrope":
            lengths.append(int(rope["original_max_position_embeddings"]))
    return min(lengths)


def _rotary_parameters(settings: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Of all layers, or of each kind of layers."""
    found = getattr(settings, "rope_parameters", None) or {}
    yield found
    yield from (value for value in found.values() if isinstance(value, dict))
