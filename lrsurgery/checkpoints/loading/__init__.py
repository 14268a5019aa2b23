"""Ways from a folder into a module besides transformers' own, and the check that a written folder loads."""
