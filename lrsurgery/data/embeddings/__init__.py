"""Sentence embeddings: pairs of sentences that are alike, or that have a score of how much."""
