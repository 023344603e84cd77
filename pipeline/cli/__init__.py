"""The command line: one file per package that has verbs."""
