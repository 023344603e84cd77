"""The mathematics of block-wise neural-ODE flows, without images, files or a command line."""
