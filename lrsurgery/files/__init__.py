"""Files on disk: one reader of JSON, writing whole or not at all, digests, pieces, locks, the cache folder."""
