"""Checkpoints on disk: finding, loading, writing, the transformers integration, the cache of spectra."""
