"""Images to measure and to judge encoders on."""
