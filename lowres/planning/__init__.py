"""What a recipe will cost before it is run: the rehearsal, the plan, the ladder of what saves."""
