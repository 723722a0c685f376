"""The resident model: loading it, running it, and what a directory of one holds."""
