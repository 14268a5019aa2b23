"""Layers that are parameters of a module which reads them itself: recurrent weights, stacked attention projections."""
