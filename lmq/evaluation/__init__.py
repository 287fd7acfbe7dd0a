"""Evaluation: perplexity, divergence, zero-shot tasks, memory and speed."""
