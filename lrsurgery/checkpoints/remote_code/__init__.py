"""Folders that load without lrsurgery, by code of their own that is made of this package's."""
