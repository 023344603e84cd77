"""Malicious files: of a pickle nothing runs, nothing is written outside, and bombs stay small."""
