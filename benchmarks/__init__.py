"""Benchmarks of the ops: `registry` says what is measured, `timing` how, `numbers` writes docs/numbers.md."""
