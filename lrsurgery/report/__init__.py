"""What is known of a model, and showing it."""
