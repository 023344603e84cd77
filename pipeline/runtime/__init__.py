"""This process and its siblings: collectives, random generators, the terminal, resources."""
