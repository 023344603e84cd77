"""Measuring and showing images: Inception features, distances, reference statistics, pictures.

Knows nothing of flows, autoencoders or the pipeline. Always imported as `from eval.… import …`.
"""
