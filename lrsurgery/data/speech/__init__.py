"""Sound by the checkpoint's own feature extractor, and what is said in it."""
