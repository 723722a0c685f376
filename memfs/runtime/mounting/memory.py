"""A memory that is or was in the model, and the files that it came from.

Used by the tiers that hold it (``mounted``, ``host``). What looks at files blocks: I/O threads.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

from memfs.errors import InvalidRequest, NotFound
from memfs.runtime.cubes import Cube, Files, Signature
from memfs.runtime.kv.encoding import Encoded
from memfs.runtime.model.kv_cache import KVCache


@dataclass
class Memory:
    """A KV cache: of one cube, or of several placed one after another."""

    cube: Cube | None
    """None for several."""
    cache: KVCache
    ids: array[int]
    """Of the cube's tokens; none for several."""
    payload_sha256: str
    payload_signature: Signature | None
    kv_signature: Signature | None
    """Of its file; where these rows are in no file, of the one that they take the place of."""
    computed: bool = False
    """Whether these rows were computed here, of this very text."""
    unpublished: Encoded | None = None
    """What is to be written to the file, where that does not hold these rows."""
    pinned: bool = False
    """Whether the cube's header pinned it when it was last looked at."""
    storage: str | None = None
    """How the file was stored that it was read from; None for several."""
    composed: str | None = None
    """How several were put together: by which policy, or ``exact``; None for one."""
    joint: float | None = None
    """The share that is done of what will make it exact; None where that is not under way."""

    @property
    def rows(self) -> str:
        """Names these rows among those of a cube: by the text that they are of, and by whether it
        is known that they are. Who may write a file may have put other rows beside the same text.
        """
        return f"{self.payload_sha256}\0{'computed' if self.computed else self.kv_signature}"

    def copied_to(self, cache: KVCache) -> Memory:
        """The same in another cache, which holds a copy of the rows."""
        unpublished = self.unpublished and replace(self.unpublished, cache=cache)
        return replace(self, cache=cache, unpublished=unpublished)

    @property
    def nbytes(self) -> int:
        """Bytes it holds where it is."""
        return self.cache.nbytes

    def unchanged(self, files: Files) -> bool:
        """Whether it was read from these very files. Raises NotAllowed."""
        try:
            if files.open_kv()[1] != self.kv_signature:
                return False
        except NotFound:
            return False
        if files.signature == self.payload_signature:
            return True
        try:
            text = files.text()  # touched, or saved again with the same words
        except InvalidRequest:
            return False
        if text.sha256 != self.payload_sha256:
            return False
        self.payload_signature = text.signature
        return True
