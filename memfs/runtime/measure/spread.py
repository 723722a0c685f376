"""What is kept of a measure's repetitions. Used by every bench; no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, and the range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
