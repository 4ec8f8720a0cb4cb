"""Several sets of rows as one (data.sources): how much of each, and the tokens of the mix."""
