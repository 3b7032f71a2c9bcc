"""`python -m gatrain` is the same as `gatrain`."""

from gatrain.start import main

main()
