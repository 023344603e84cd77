"""Commands of the command line, one file or folder for each package that has commands.

A command imports the modules that do its work when it runs: they need torch, and `--help` must
stay quick.
"""
