"""Evaluation of images: Inception features, distances, reference statistics, figures.

The package does not depend on flows, autoencoders or the pipeline. It shares its name with a
built-in function, so it is always imported as `from eval.… import …`.
"""
