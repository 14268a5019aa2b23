"""Fused experts: parameters of three axes, one matrix an expert, and the banks of factors that replace them."""
