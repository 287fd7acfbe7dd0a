"""Checkpoints of lmq written in the formats of other programs."""
