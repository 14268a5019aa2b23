"""The integration with transformers: factorised checkpoints load through its `from_pretrained`."""
