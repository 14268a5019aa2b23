"""Tasks and their examples, as the checkpoint itself wants them."""
