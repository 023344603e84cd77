"""Benchmark: models of one size and one budget on one data set, as a table with plots."""
