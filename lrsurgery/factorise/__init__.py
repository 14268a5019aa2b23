"""Factorisation of checkpoints and models: calibrate, allocate ranks, decompose, rewrite."""
