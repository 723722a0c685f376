"""Attention over a KVCache, put into transformers through its attention interface.

transformers' own path repeats the grouped heads (three copies of a 4k-token cache for each new
token of the default model) and builds masks for sequences that begin at row 0. Here the queries
are folded onto their KV head instead, and nothing of the cache is copied. Which of three ways is
taken depends on the numbers of rows alone, so the same rows give the same bits whether the cache
was just computed or came from a file. Rows of several sequences in one forward attend each to their
own, one sequence at a time. Called by the model's forward, in the model's thread.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from memfs.errors import ModelUnusable

NAME = "memfs"
FEW_ROWS = 64
"""Up to this many query rows two matrix products beat the fused kernel on a CPU (measured: 22 rows
on 4,096 in bfloat16, 37 ms against 73 ms over 30 layers; 256 rows 850 ms against 550 ms)."""

LONG = 1024
"""From this many rows on, a product for each head is faster than one batched: that copies keys and
values first, because the room behind the rows makes the batch's stride a wide one (28 rows on
4,096: 27 ms against 31; on 256: 5.3 against 3.2). A single query row on fewer is fastest in the
fused kernel, which copies nothing (bfloat16, a layer: 76 µs against 119 on 256; on 4,096 864
against 582)."""


class Span(NamedTuple):
    """The keys, or the values, of one of the sequences in a forward."""

    tensor: torch.Tensor
    """[1, kv_heads, length, head_dim]"""
    rows: int
    """How many of the forward's queries are this sequence's."""
    at: torch.Tensor | None
    """The positions of the queries, int64 [rows]; None where they are the last rows."""


def attend(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | list[Span],
    value: torch.Tensor | list[Span],
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of rows of a sequence to all rows of it; of several, one after another.

    Args:
        query: [1, heads, rows, head_dim].
        key, value: [1, kv_heads, length, head_dim], the queries being the last ``rows`` of them;
            or one ``Span`` a sequence, whose queries follow one another.
        sliding_window: rows a query sees, itself included; None for all.

    Returns:
        [1, rows, heads, head_dim], and None in the place of the weights.

    Raises:
        ModelUnusable: for what this does not compute (attention sinks, capped scores).
    """
    for unknown in ("softcap", "s_aux"):
        if kwargs.get(unknown) is not None:
            raise ModelUnusable(f"its attention needs {unknown}, which memfs does not compute")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor):
        out = _one_sequence(query, key, value, None, scale, sliding_window)
    else:
        queries = query.split([span.rows for span in key], dim=2)
        out = torch.cat(
            [
                _one_sequence(q, k.tensor, v.tensor, k.at, scale, sliding_window)
                for q, k, v in zip(queries, key, value, strict=True)
            ],
            dim=2,
        )
    return out.transpose(1, 2).contiguous(), None


def _one_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    at: torch.Tensor | None,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """[1, heads, rows, head_dim]; ``at`` as in ``Span``."""
    rows, length = query.shape[-2], key.shape[-2]
    if window is not None and window >= length:
        window = None
    if at is None and window is None and rows <= FEW_ROWS and query.device.type == "cpu":
        return _few_rows(query, key, value, scale)
    whole = at is None and rows == length and window is None
    mask = None if whole else _seen(rows, length, window, at, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True
    )


def _few_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Two products for each KV head; only the last square of the scores is masked."""
    _, heads, rows, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    folded = query.reshape(kv_heads, heads // kv_heads * rows, head_dim)
    if rows == 1 and length < LONG:  # nothing is masked: a group's heads are rows of one head
        out = F.scaled_dot_product_attention(folded[None], key, value, scale=scale)
        return out.view(1, heads, rows, head_dim)
    if length < LONG:
        scores = torch.bmm(folded, key[0].transpose(1, 2))
    else:
        scores = torch.stack([f @ k.t() for f, k in zip(folded, key[0], strict=True)])
    scores *= scale
    if rows > 1:
        future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu_(1)
        last = scores.view(kv_heads, -1, rows, length)[..., length - rows :]
        last.masked_fill_(future, float("-inf"))
    weights = scores.softmax(-1)
    if length < LONG:
        out = torch.bmm(weights, value[0])
    else:
        out = torch.stack([w @ v for w, v in zip(weights, value[0], strict=True)])
    return out.view(1, heads, rows, head_dim)


def _seen(
    rows: int, length: int, window: int | None, at: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """[rows, length], True where a query row sees a key row; None where all see all."""
    if at is None:
        if rows == 1 and window is None:
            return None
        at = torch.arange(length - rows, length, device=device)
    keys = torch.arange(length, device=device)[None]
    seen = keys <= at[:, None]
    if window is not None:
        seen &= keys > at[:, None] - window
    return seen


AttentionInterface.register(NAME, attend)
