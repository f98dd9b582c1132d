"""What to run: the best recipe that fits a card, and which method to try first."""
