"""How much a model needs each of its layers: signals read off activations, and losses of models without a layer.

Removal importance is not quantization sensitivity: a layer that can be left out may still need many bits.
"""
