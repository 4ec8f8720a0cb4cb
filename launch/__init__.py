"""From a recipe to a trained, exported and evaluated adapter; each launch/*.py is one command."""
