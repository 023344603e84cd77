"""The paper's two-dimensional experiments."""
