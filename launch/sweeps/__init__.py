"""Tables of runs: which are needed, what they gave, how it is shown."""
