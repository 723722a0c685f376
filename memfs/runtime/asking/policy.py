"""What is computed again where several cubes are placed: how ``compose`` is written. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from memfs.errors import InvalidConfig


@dataclass(frozen=True)
class Policy:
    """Of the cubes behind the first one; nothing where both are 0: they are rotated only."""

    link: int = 0
    """Rows at the beginning of each."""
    blend: float = 0.0
    """The share of their rows that differ most."""

    @classmethod
    def parse(cls, text: str) -> Policy:
        """``rotate``, ``link:16`` or ``blend:0.1``. Raises InvalidConfig."""
        kind, _, amount = text.partition(":")
        try:
            if text == "rotate":
                return cls()
            if kind == "link" and int(amount) > 0:
                return cls(link=int(amount))
            if kind == "blend" and 0 < float(amount) <= 1:
                return cls(blend=float(amount))
        except ValueError:
            pass
        raise InvalidConfig(
            f"compose = {text!r} is none of rotate, link:ROWS (link:16) and blend:SHARE (blend:0.1)"
        )

    def __str__(self) -> str:
        if self.link:
            return f"link:{self.link}"
        return f"blend:{self.blend:g}" if self.blend else "rotate"
