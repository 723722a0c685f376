"""The extended attributes that are a file's own: a file that is published in its place keeps them.

Not those that memfs answers for (see ``filesystem.xattrs``), the access lists, which go with owner
and mode (see ``rights``), nor what the kernel gives and takes by itself. Used by whoever publishes;
any thread.
"""

from __future__ import annotations

import errno
import os

PREFIX = "user.memfs."
"""Start of the names that memfs answers for."""

_KINDS = ("user.", "trusted.")
_NONE = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT, errno.EACCES, errno.EPERM)
"""There is none, or none of that name any more, or it is not for us to see."""


def copy_own(directory: int, name: str, fd: int) -> None:
    """Gives an open file those of what is called so in an open directory; nothing may be.

    Raises OSError (ENOSPC) where they cannot be written.
    """
    source = f"/proc/self/fd/{directory}/{name}"
    try:
        found = os.listxattr(source, follow_symlinks=False)
    except OSError as e:
        if e.errno not in _NONE:
            raise
        return
    for attribute in found:
        if attribute.startswith(_KINDS) and not attribute.startswith(PREFIX):
            try:
                value = os.getxattr(source, attribute, follow_symlinks=False)
            except OSError as e:
                if e.errno not in _NONE:
                    raise
            else:
                os.setxattr(fd, attribute, value)
