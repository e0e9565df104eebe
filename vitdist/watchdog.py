"""Sees that a rank goes on: after too long without progress it leaves all stacks in the run folder and ends. Imports no torch."""
