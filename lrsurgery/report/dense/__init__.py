"""Dense models: their spectra and what ranks would do to them, and what of them is within reach."""
