"""The benchmark of each op, by what it belongs to."""
