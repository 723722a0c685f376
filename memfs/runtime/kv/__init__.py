"""KV caches: the buffers in memory, the file, and how one is made from a text."""
