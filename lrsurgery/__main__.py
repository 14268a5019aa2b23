"""`python -m lrsurgery`."""

from lrsurgery.cli import main

main()
