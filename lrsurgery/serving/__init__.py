"""Factorised checkpoints in servers of other people."""
