"""Models behind the interface that transformers' Trainer expects."""
