"""The audit trail: append-only files whose lines are chained by their hashes."""
