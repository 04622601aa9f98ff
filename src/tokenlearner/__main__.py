"""`python -m tokenlearner` is the command `tokenlearner`."""

from tokenlearner_command import main

main()
