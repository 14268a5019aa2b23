"""Forms of factorised layers: their tensors, and the change from one form to another."""
