"""Optimizers that know of factors."""
