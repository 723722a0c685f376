"""Versions: what a cube's memories were, kept in the store, made, looked at, checked, restored."""
