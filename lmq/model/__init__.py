"""Models: what they are made of, where they come from, and their tensors read block by block."""
