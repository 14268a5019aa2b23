"""Calibration: second moments of layer inputs and output gradients, which weight the errors of layers."""
