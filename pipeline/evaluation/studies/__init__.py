"""Studies: FID against evaluations of the velocity, and against the length of a training."""
