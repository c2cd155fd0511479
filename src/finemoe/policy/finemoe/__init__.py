"""finemoe's own policy."""
