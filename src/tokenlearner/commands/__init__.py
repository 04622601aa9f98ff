"""The command `tokenlearner`: one file or folder for each of its commands."""
