"""The report of a run: one HTML page with the answer, the evidence and the costs; a card for every checkpoint."""
