"""Readers of files of unknown origin, each with a whole file that the fuzz tests damage."""
