"""The next tokens of several answers, in one forward.

What decodes asks for its logits by yielding a ``Step``; the worker gathers the steps of all that do
and takes them at once, so that the model's weights are read once for all. Runs in the model's
thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident

MOST = 32
"""Sequences in one forward. More would read the weights less often for each token, which gains less
and less, and who asks anew waits for one forward."""


@dataclass(frozen=True)
class Step:
    """One token behind the rows in a cache; what is wanted are the logits after it."""

    resident: Resident
    cache: KVCache
    token: int


def take(steps: Sequence[Step]) -> list[torch.Tensor | Exception]:
    """The logits after each step, float32 [vocabulary], or the error that its sequence meets.

    One alone gives the bits of ``Engine.forward``; among others sums are taken in another order,
    and the last bits may differ.
    """
    if len(steps) > 1 and steps[0].resident.packs:
        caches, ids = [step.cache for step in steps], [[step.token] for step in steps]
        try:
            return list(steps[0].resident.engine.together(caches, ids))
        except Exception:  # noqa: BLE001  one's error, or all's, and no cache was changed: each alone
            pass
    return [_alone(step) for step in steps]


def _alone(step: Step) -> torch.Tensor | Exception:
    try:
        logits = step.resident.engine.forward(step.cache, [step.token])
    except Exception as e:  # noqa: BLE001  it is its own sequence's, and thrown into its job
        return e
    assert logits is not None
    return logits
