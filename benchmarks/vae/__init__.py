"""The VAE's decoder alone: what it moves and computes, and how long it takes, whole and layer by layer."""
