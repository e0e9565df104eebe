"""The report of a run: verdict, what ran, curves, classes, mistakes, interruptions, commands.

Made from the run folder alone, without torch, at any moment of a run; what is missing is left out.
"""
