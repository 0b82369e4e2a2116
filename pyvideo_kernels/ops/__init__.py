"""Public functions, one file an op: checks arguments once, raises typed errors, calls the op."""
