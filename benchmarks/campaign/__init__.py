"""Everything worth knowing about a card, in slices that fit a time limit: ``python -m benchmarks.campaign``."""
