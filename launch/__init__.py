"""From a recipe to a trained, exported and evaluated adapter. Each command is a page of plain steps."""

import os

# Else torch prints the C++ stack when the store of a process group closes. Read when torch is first imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
