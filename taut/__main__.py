"""`python -m taut`, the same as the `taut` command."""

from taut.cli import main

main()
