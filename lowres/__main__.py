"""`python -m lowres` is `lowres`."""

from lowres.cli.main import main

main()
