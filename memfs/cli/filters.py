"""What the options of commands that search mean: users and times. Used by ``index`` and ``log``."""

from __future__ import annotations

import pwd
import re
import time
from datetime import datetime

from memfs.errors import InvalidRequest


def uid(user: str) -> int:
    """The number of a user that is named, or numbered."""
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise InvalidRequest(f"there is no user {user}") from None


def moment(text: str) -> float:
    """Seconds since 1970 of a date, a time, or so many days, hours or minutes ago."""
    ago = re.fullmatch(r"(\d{1,9})([dhm])", text)
    if ago:
        return time.time() - int(ago[1]) * {"d": 86400, "h": 3600, "m": 60}[ago[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise InvalidRequest(f"{text!r} is no time: 2026-02-28, or 7d, 12h, 30m") from None
