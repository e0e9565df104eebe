"""Why a rank ended, in the words of a catalogue: the record of each rank, and the root among them. Imports no torch."""
