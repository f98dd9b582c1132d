"""What a recipe will cost before it is run: rehearsal, plan, and the ladder of what would save."""
