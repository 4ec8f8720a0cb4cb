"""What each adapter method needs, and what it trains."""
