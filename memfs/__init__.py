"""memfs: the filesystem for a language model's memory."""

__version__ = "0.1.0"
