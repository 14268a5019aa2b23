"""Which errors matter."""
