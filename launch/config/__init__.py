"""The typed recipe: its fields, and how a file and the command line fill them."""
