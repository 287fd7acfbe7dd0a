"""The stages of a run as a graph: built, explained, and walked."""
