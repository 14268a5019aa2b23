"""Files on disk: one reader of JSON, writing whole or not at all, digests, pieces, marks, locks."""
