"""``python -m subquad.cli``."""

from subquad.cli import main

main()
