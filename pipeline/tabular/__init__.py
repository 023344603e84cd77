"""Tabular data sets of the flow literature: POWER, GAS, MINIBOONE and BSDS300."""
