"""`python -m gatrain` is the same as `gatrain`."""

from gatrain.cli import main

main()
