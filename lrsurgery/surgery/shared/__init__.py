"""Layers that share an input and one `v`: query, key and value; gate and up."""
