"""Out of memory, on a device or in this process, as an error of memfs's own.

What torch raises for it is a RuntimeError of another class on each device, and is known by its
words. No torch here. Used by the worker, the mounted set and the server, each for what runs in its
threads; any thread.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from memfs.errors import OutOfMemory

P = ParamSpec("P")
R = TypeVar("R")

_WORDS = re.compile(
    "out of memory"  # CUDA: torch's allocator, the driver, pinned memory
    "|can't allocate memory"  # torch on a CPU
    "|CUBLAS_STATUS_ALLOC_FAILED"
    "|bad_alloc"
    "|can't start new thread",
    re.IGNORECASE,
)
_WANTED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


def shortage(error: BaseException) -> OutOfMemory | None:
    """The error as OutOfMemory, where it is about memory that could not be had; None elsewhere."""
    if isinstance(error, OSError):
        short = error.errno == errno.ENOMEM
    elif isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        short = bool(_WORDS.search(str(error)))
    else:
        short = isinstance(error, MemoryError)
    if not short:
        return None
    wanted = _WANTED.search(str(error))
    return OutOfMemory(
        f"{wanted[1] if wanted else 'what was wanted'} could not be had; ask for less, take "
        "memories out of the model (memfs detach), or give it a smaller budget_bytes"
    )


def telling(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What the function returns. Raises OutOfMemory where it ran out of memory.

    The first error is let go before: its frames hold what the function had allocated so far.
    """
    try:
        return function(*args, **kwargs)
    except Exception as e:
        short = shortage(e)
        if short is None:
            raise
    try:
        raise short
    finally:
        del short  # else this frame and the error hold each other, and whatever is on the way
