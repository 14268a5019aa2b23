"""Targets in a user's own terms in place of ranks: a loss, an accuracy, a size, a speed; and the curve between them."""
