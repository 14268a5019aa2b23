"""`python -m lrsurgery`."""

from lrsurgery.cli.app import main

main()
