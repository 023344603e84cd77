"""Block-wise neural-ODE flows: the mathematics, without images, files or a command line."""
