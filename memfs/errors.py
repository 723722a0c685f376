"""The one tree of errors. Each has an errno (what a file operation returns) and an exit code.

An error's message is the first line of its docstring, then the detail it was raised with. Errors
cross the Unix sockets as ``to_wire()`` and come back as the same class through ``from_wire()``.

Exit codes, also in docs/cli.md: 1 failed, 2 wrong usage, 3 not found, 4 refused because it does
not fit, 5 no runtime, 6 the model cannot serve, 7 invalid input, 8 not permitted, 9 mount problem.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class MemfsError(Exception):
    """memfs failed"""

    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1

    def __init__(self, detail: str = "") -> None:
        self.detail = detail
        summary = (type(self).__doc__ or "").strip().splitlines()[0].rstrip(".")
        super().__init__(f"{summary}: {detail}" if detail else summary)

    def to_wire(self) -> dict[str, str]:
        """This error as a JSON object: ``type``, ``detail`` and the whole ``message``."""
        return {"type": type(self).__name__, "detail": self.detail, "message": str(self)}


class NotFound(MemfsError):
    """not found"""

    errno = _errno.ENOENT
    exit_code = 3


class NotACube(NotFound):
    """not a MemCube (no payload.md, kv.safetensors, adapter/ or meta.json there)"""


class NotAllowed(MemfsError):
    """not permitted"""

    errno = _errno.EACCES
    exit_code = 8


class InvalidMetadata(MemfsError):
    """meta.json is not valid"""

    errno = _errno.EINVAL
    exit_code = 7


class InvalidRequest(MemfsError):
    """the request is not valid"""

    errno = _errno.EINVAL
    exit_code = 7


class BadArchive(MemfsError):
    """the archive is refused"""

    errno = _errno.EINVAL
    exit_code = 7


class Untrusted(NotAllowed):
    """the archive's signature is not accepted"""


class InvalidConfig(MemfsError):
    """the configuration is not valid"""

    errno = _errno.EINVAL
    exit_code = 7


class Refused(MemfsError):
    """refused: it does not fit the resident model"""

    errno = _errno.EINVAL
    exit_code = 4


class KVCorrupt(Refused):
    """the KV cache is damaged"""


class KVForeign(Refused):
    """the KV cache was made by another model"""


class KVStale(Refused):
    """the KV cache was made from another text"""


class AdapterCorrupt(Refused):
    """the adapter is damaged"""


class TooLong(Refused):
    """the text does not fit the model's context"""

    errno = _errno.EFBIG


class OverBudget(Refused):
    """there is no room for it within the memory budget"""

    errno = _errno.ENOMEM


class OutOfMemory(Refused):
    """there is not enough memory on the device"""

    errno = _errno.ENOMEM


class RuntimeUnavailable(MemfsError):
    """no runtime is answering"""

    errno = _errno.EAGAIN
    exit_code = 5


class ModelUnusable(MemfsError):
    """the model cannot serve"""

    errno = _errno.ENODEV
    exit_code = 6


class DiskFull(MemfsError):
    """there is no room on the disk"""

    errno = _errno.ENOSPC


class MountFailed(MemfsError):
    """the mount failed"""

    exit_code = 9


class IndexDamaged(MemfsError):
    """the index is damaged"""


class VersionDamaged(MemfsError):
    """the version is damaged"""


class Interrupted(MemfsError):
    """interrupted"""

    errno = _errno.EINTR
    exit_code = 130


def _all_errors(base: type[MemfsError]) -> dict[str, type[MemfsError]]:
    found = {base.__name__: base}
    for sub in base.__subclasses__():
        found.update(_all_errors(sub))
    return found


def from_wire(data: object) -> MemfsError:
    """The error that ``to_wire()`` described; a plain MemfsError where its type is unknown."""
    if not isinstance(data, dict):
        return MemfsError(str(data))
    kind = _all_errors(MemfsError).get(str(data.get("type")), MemfsError)
    return kind(str(data.get("detail") or ""))
