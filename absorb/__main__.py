"""`python -m absorb` is the command."""

from absorb.cli import main

main()
