"""The search for launch configurations of a card: ``python -m benchmarks.tune``."""
