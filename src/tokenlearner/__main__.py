"""`python -m tokenlearner` is the command `tokenlearner`."""

from .cli import main

main()
