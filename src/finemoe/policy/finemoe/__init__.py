"""finemoe's own policy: nearest-neighbour search over past iterations, at token and layer granularity."""
