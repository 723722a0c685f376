"""Scripts as people type them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def shell(script: str, cwd: Path, **env: str | Path) -> str:
    """Runs a script that must succeed, step by step; what it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env=os.environ | {name: str(value) for name, value in env.items()},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
