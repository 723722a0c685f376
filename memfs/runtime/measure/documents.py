"""Invented documents, and questions that each of them answers. Used by the benches; no torch.

Nothing in them is anywhere else, so that what a model says of them it has read in them.
"""

from __future__ import annotations

from dataclasses import dataclass

_PLACES = (
    # what it is, who runs it, what it has, what it uses up
    ("lighthouse", "keeper", "lamps", "oil"),
    ("observatory", "astronomer", "mirrors", "silver"),
    ("bakery", "baker", "ovens", "rye flour"),
    ("shipyard", "master", "slipways", "oak"),
    ("archive", "archivist", "reading desks", "paper"),
    ("orchard", "grower", "cider presses", "crates"),
    ("foundry", "founder", "furnaces", "charcoal"),
    ("ferry house", "ferryman", "boats", "rope"),
)
_NAMES = ("Orla", "Fenwick", "Tamsin", "Bruno", "Ysolde", "Caspar", "Merete", "Anselm", "Petra")
_TOWNS = ("Harrowmouth", "Selby Quay", "Dunmere", "Pellan", "Corrow", "Vasby", "Ostrey", "Lind")
_HIDDEN = ("barometer", "stove", "clock", "map of the coast", "second door")
_WINDS = ("north", "east", "south", "west")


@dataclass(frozen=True)
class Document:
    """A text, and questions about it."""

    text: str
    questions: tuple[str, ...]


def documents(count: int) -> list[Document]:
    """``count`` documents of about 400 to 1,300 tokens, each another; the same at every call."""
    return [_document(number) for number in range(count)]


def _document(number: int) -> Document:
    what, who, things, stuff = _PLACES[number % len(_PLACES)]
    name, other, third = (_NAMES[(number * 2 + step) % len(_NAMES)] for step in (0, 3, 5))
    town, far = _TOWNS[number * 3 % len(_TOWNS)], _TOWNS[(number * 3 + 4) % len(_TOWNS)]
    hidden = _HIDDEN[number % len(_HIDDEN)]
    paragraphs = [
        f"# The {what} at {town}",
        f"The {who} at {town} is called {name}. The {what} was built in {1790 + number * 17} by "
        f"people from {far}, and has {5 + number * 4} {things}. On Sundays {other} is on duty, "
        f"and the spare key hangs behind the {hidden}.",
    ]
    paragraphs += [
        f"On day {day} {name} counted {(day * 7 + number) % 41 + 2} visitors, paid "
        f"{(day * 5 + number) % 13 + 3} marks for {stuff} and wrote that the wind had turned to "
        f"the {_WINDS[(day + number) % 4]}. {third} came from {_TOWNS[(day + number) % 8]} with "
        f"{(day * 3 + number) % 17 + 2} letters, one of them for {_NAMES[(day * 2) % 9]}."
        for day in range(1, 6 + number % 8 * 2)
    ]
    questions = (
        f"What is the {who} called?",
        f"In which year was the {what} built, and by whom?",
        f"Who is on duty on Sundays, and how many {things} are there?",
        "Where does the spare key hang?",
        f"What did {name} write down? Answer in two sentences.",
    )
    return Document("\n\n".join(paragraphs), questions)
