"""Answering questions from what is mounted."""
