"""The token ids around a memory, taken once from the model's own chat template.

A memory stands in the system turn, where small models use it best (measured on SmolLM2: 30 of 40
questions right, against 23 in the user's turn); in the user's turn, before the question, where a
template knows no system turn. Preamble, cube and question are tokenized apart and their *ids*
joined, so the boundaries are the same with and without a KV cache. Text from files or users is
never allowed to become a special token. Pure but for the tokenizer; the model's thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from memfs.errors import ModelUnusable, TooLong

SEPARATOR = "\n\n"
"""Ends every memory, inside its own rows, so that whatever follows is set apart."""

_MEMORY, _QUESTION = "\x02memory\x02", "\x03question\x03"


@dataclass(frozen=True)
class Prompt:
    """A tokenizer, and the fixed parts of its chat template as token ids."""

    tokenizer: PreTrainedTokenizerBase
    preamble: tuple[int, ...]
    """In front of every memory: the template's opening."""
    separator: tuple[int, ...]
    before_question: tuple[int, ...]
    after_question: tuple[int, ...]
    bare_before: tuple[int, ...]
    """In front of a question with no memory."""
    bare_after: tuple[int, ...]
    longest_token: int
    """Characters of the longest token there is: no text has fewer tokens than that makes of it."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The parts of this tokenizer's template. Raises ModelUnusable where it has none to use."""
        if not tokenizer.chat_template:
            raise ModelUnusable("its tokenizer has no chat template; take an instruct model")
        if not tokenizer.is_fast:
            raise ModelUnusable("its tokenizer is a slow one; memfs needs a tokenizer.json")
        opening, middle, closing = _parts(tokenizer)
        bare, bare_closing = _render(tokenizer, [("user", _QUESTION)]).split(_QUESTION)

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False).input_ids)

        return cls(
            tokenizer,
            preamble=ids(opening),
            separator=tuple(plain_ids(tokenizer, SEPARATOR)),
            before_question=ids(middle),
            after_question=ids(closing),
            bare_before=ids(bare),
            bare_after=ids(bare_closing),
            longest_token=max(map(len, tokenizer.get_vocab())),
        )

    def memory(self, text: str, limit: int | None = None) -> list[int]:
        """The ids of a cube's rows: its text and the separator.

        Raises TooLong for a text that has more than ``limit`` tokens however it is tokenized: that
        is not tried on megabytes, while others wait.
        """
        if limit is not None and len(text) > limit * self.longest_token:
            raise TooLong(f"{len(text)} characters, where the model takes {limit} tokens")
        return [*plain_ids(self.tokenizer, text), *self.separator]

    def question(self, text: str, *, bare: bool) -> list[int]:
        """The ids from the end of the memory to the beginning of the answer."""
        before = self.bare_before if bare else self.before_question
        after = self.bare_after if bare else self.after_question
        return [*before, *plain_ids(self.tokenizer, text), *after]


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text in which nothing is special: ``<|im_end|>`` in a file is just letters."""
    found: list[int] = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True
    ).input_ids
    return found


def _parts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The template's text before the memory, between memory and question, after the question."""
    for turns in (
        [("system", _MEMORY), ("user", _QUESTION)],
        [("user", _MEMORY + "\n" + _QUESTION)],
    ):
        try:
            text = _render(tokenizer, turns)
        except (ModelUnusable, jinja2.TemplateError):
            continue  # a template that raises for a system turn has none
        opening, found, rest = text.partition(_MEMORY)
        middle, asked, closing = rest.partition(_QUESTION)
        if found and asked:
            return opening, middle, closing
    raise ModelUnusable(
        "its chat template shows neither a system turn nor the user's text as it is"
    )


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        add_generation_prompt=True,
        tokenize=False,
    )
    if not isinstance(text, str) or text.count(turns[-1][1]) != 1:
        raise ModelUnusable("its chat template does not show the user's text once and as it is")
    return text
