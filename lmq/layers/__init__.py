"""Whole layers: how much a model needs them, and models without some of them."""
