"""From a recipe to a trained, exported and evaluated adapter. Each command is a page of plain steps."""
