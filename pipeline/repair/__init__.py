"""Repairs: broken files are made again by the code of the commands that make them."""
