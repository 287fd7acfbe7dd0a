"""Work beside runs through the same cached stages: studies, layer importance, pruning, frontiers."""
