"""What was measured of models of several sizes: the points of a search for a target, and a curve."""
