"""Which layer becomes what, and doing it in memory."""
