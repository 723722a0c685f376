"""The past of a store: versions made behind the files, and shown as directories."""
