"""`tokenlearner bench`: models measured side by side."""
