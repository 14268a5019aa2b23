"""Commands on folders that exist: exports of a model, the cache."""
