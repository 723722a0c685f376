"""Decisions that need no I/O of their own."""
