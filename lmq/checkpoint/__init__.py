"""Quantized checkpoints: written, verified, and opened again."""
