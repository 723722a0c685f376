"""The LMDB index over a store: records, queries, usage, audit trail. Disposable but for usage."""
