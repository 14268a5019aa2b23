"""Text: into tokens, pieces of tokens and batches of these; `examples` goes all of the way."""
