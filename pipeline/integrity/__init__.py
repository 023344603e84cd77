"""Hashes of files: the list of the shipped ones, and digests inside single files."""
