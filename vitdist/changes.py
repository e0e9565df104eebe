"""What a changed setting does to a run that goes on: a rule for each setting. Imports no torch."""
