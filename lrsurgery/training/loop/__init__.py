"""The training loop: transformers' Trainer with what low rank asks for, its arguments, what it reports."""
