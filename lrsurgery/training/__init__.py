"""Training in low rank."""
