"""Every touch of a private part of torch, transformers or DeepSpeed: one function each.

A private part may change with any release, without a word. launch.runtime.compat.versions has the
versions that the tests were run with, and tells where others are installed. Each docstring says why
no public part will do, and which upstream report, as of 2026-11, would make the function
unnecessary; where none is named, none was found.
"""
