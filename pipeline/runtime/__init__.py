"""Collectives, random generators, the terminal and system resources of a process."""
