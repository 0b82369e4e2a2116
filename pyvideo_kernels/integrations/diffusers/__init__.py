"""One file per diffusers model: which modules are swapped, by what, and what is left."""
