"""Pinned cubes are in the model from its start: the mount knows which they are, and asks for them.

Used by ``serving`` when a model has become ready; a thread of its own, as loading may take a while.
"""

from __future__ import annotations

import logging

from memfs.config import Config
from memfs.errors import MemfsError, RuntimeUnavailable
from memfs.runtime.client import connect

log = logging.getLogger(__name__)


def load_pinned(config: Config, store: str, paths: list[str]) -> None:
    """Has the cubes at ``paths`` loaded and kept. One that cannot be is told of in the log."""
    try:
        with connect(config, start=False) as client:
            for path in paths:
                try:
                    client.call("pin", store=store, path=path, on=True)
                except RuntimeUnavailable:
                    raise
                except MemfsError as e:
                    log.info("%s is pinned and is not in the model: %s", path, e)
    except RuntimeUnavailable as e:
        log.debug("the runtime was not told of what is pinned: %s", e)
