"""Mistakes on the command line: each ends with exit code 2 and one sentence, soon."""
