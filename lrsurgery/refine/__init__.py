"""Fitting of a factorised model to its dense model, block by block and without labels."""
