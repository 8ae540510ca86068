"""`python -m glcan.cli`, the same as `glcan`."""

from glcan.cli import main

main()
