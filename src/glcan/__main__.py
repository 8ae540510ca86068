"""`python -m glcan`, the same as `glcan`."""

from glcan.cli import main

main()
