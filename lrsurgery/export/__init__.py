"""From a factorised folder to what other tools read."""
