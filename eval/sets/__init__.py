"""Sets of images and statistics of features, read from files."""
