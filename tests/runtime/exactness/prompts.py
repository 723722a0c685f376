"""Texts and questions of given lengths, the same ones at every run."""

from __future__ import annotations

import random
from dataclasses import dataclass

from memfs.runtime.model.attention import FEW_ROWS
from memfs.runtime.model.engine import PREFILL_CHUNK
from memfs.runtime.model.prompt import Prompt, plain_ids

LONGEST_TEXT = 900
LONGEST_QUESTION = 300

EDGES = sorted(
    {
        1,
        2,
        *(FEW_ROWS + d for d in (-1, 0, 1)),
        *(chunks * PREFILL_CHUNK + d for chunks in (1, 2, 3) for d in (-1, 0, 1)),
        LONGEST_QUESTION,
        LONGEST_TEXT,
    }
)
"""Rows at which something else is computed: other chunks, another way of attention."""

PROSE = """
the keeper of light wrote down what ships had passed , and at which hour . He — Jürgen — said : "7
boats, 23 sails; wind NNW!" naïve café 東京 🙂 x = y + 1
"""
WORDS = [*PROSE.split(), "\n", "\n\n"]


@dataclass(frozen=True)
class Case:
    """A memory and a question to it."""

    text: str
    question: str
    rows: tuple[int, int]
    """Of the memory and of the question, with what the chat template puts around them."""


def cases(
    prompt: Prompt, count: int, *, text: int = LONGEST_TEXT, question: int = LONGEST_QUESTION
) -> list[Case]:
    """``count`` of them; every second length is one of ``EDGES``, the others anything between.

    Args:
        text, question: rows of the longest.
    """
    chance = random.Random(count)
    around = len(prompt.question("", bare=False))
    made = []
    for number in range(count):
        memory = _text(prompt, _length(chance, number, text) - len(prompt.separator), chance)
        asked = _text(prompt, _length(chance, number + 1, question) - around, chance)
        rows = (len(prompt.memory(memory)), len(prompt.question(asked, bare=False)))
        made.append(Case(memory, asked, rows))
    return made


def _length(chance: random.Random, number: int, longest: int) -> int:
    edges = [edge for edge in EDGES if edge <= longest]
    return edges[number // 2 % len(edges)] if number % 2 else chance.randint(1, longest)


def _text(prompt: Prompt, tokens: int, chance: random.Random) -> str:
    """A text of that many tokens, one at least."""
    text = "a"
    while (missing := tokens - len(plain_ids(prompt.tokenizer, text))) > 0:
        words = ["a"] if missing < 9 else chance.choices(WORDS, k=missing // 9)
        text = " ".join([text, *words])
    return text
