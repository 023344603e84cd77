"""Evaluation of images: Inception features, distances, reference statistics, figures.

Its name is that of a built-in function, so it is always imported as `from eval.… import …`.
"""
