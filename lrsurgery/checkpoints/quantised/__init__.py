"""Checkpoints that other tools quantised and whose weights are dequantised as they are read."""
