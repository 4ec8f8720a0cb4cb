"""Pages of results: one self-contained HTML file of runs, or of a sweep's table."""
