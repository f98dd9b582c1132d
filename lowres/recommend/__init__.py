"""What to run: the best recipe that fits a card, which method first, what to change in one that is
refused."""
