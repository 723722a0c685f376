"""The mount: the meaning of every file operation, and the FUSE binding under it. Never torch."""
