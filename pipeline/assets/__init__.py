"""Downloads of MNIST, CIFAR-10, POWER and the Inception weights, verified by their hashes."""
