"""Two-dimensional experiments of the JKO-iFlow paper."""
