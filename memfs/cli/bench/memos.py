"""What MemOS publishes of its KV-based memory: beside it stands what ``bench ttft --grid`` finds.

From the evaluation in arXiv:2507.03724, as the documentation of MemOS repeats it ("KVCacheMemory",
experimental results): by how much the time to first token is less with the memory as KV than as
text, the KV being on the GPU already. Their questions have 167, 302.7 and 952.7 tokens on average.
"""

from __future__ import annotations

MEMORIES = (583, 2773, 6064)
QUESTIONS = (167, 303, 953)
"""Tokens of the cells."""

MODELS = ("Qwen3-8B", "Qwen3-32B", "Qwen2.5-72B")

CUTS = {
    (583, 167): (0.713, 0.535, 0.605),
    (583, 303): (0.556, 0.396, 0.432),
    (583, 953): (0.230, 0.186, 0.238),
    (2773, 167): (0.897, 0.812, 0.716),
    (2773, 303): (0.851, 0.751, 0.792),
    (2773, 953): (0.646, 0.569, 0.627),
    (6064, 167): (0.942, 0.888, 0.914),
    (6064, 303): (0.911, 0.843, 0.872),
    (6064, 953): (0.791, 0.714, 0.764),
}
"""Of each cell (memory, question), in the order of MODELS."""
