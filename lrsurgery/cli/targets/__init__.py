"""Targets on the command line: their options, which `factorise` and `report` share."""
