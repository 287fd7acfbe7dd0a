"""What is measured of a model before anything is decided: weights, activations, gradients, and what errors cost."""
