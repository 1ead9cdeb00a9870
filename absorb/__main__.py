"""`python -m absorb` is the command."""

from absorb.cli.main import main

main()
