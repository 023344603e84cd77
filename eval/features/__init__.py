"""Networks that map images to features, and their inputs."""
