"""Environments of their own for what others wrote; for ``conformance`` and ``bench-peer``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from memfs.config import cache_dir


def environment(name: str, needs: tuple[str, ...]) -> Path:
    """The directory of an environment in the user's cache that has these packages from PyPI."""
    made = cache_dir() / name
    stamp = made / "installed"
    if not stamp.exists() or stamp.read_text() != "\n".join(needs):
        subprocess.run([sys.executable, "-m", "venv", "--clear", made], check=True)
        subprocess.run([python(made), "-m", "pip", "install", "-qq", *needs], check=True)
        stamp.write_text("\n".join(needs))
    return made


def python(made: Path) -> str:
    """The interpreter of an environment."""
    return str(made / "bin" / "python")
