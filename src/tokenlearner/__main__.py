"""`python -m tokenlearner` is the command `tokenlearner`."""

from .commands.main import main

main()
