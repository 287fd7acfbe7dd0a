"""Text to measure and to judge models on."""
