"""One report, several renderings."""
