"""Downloads of MNIST, CIFAR-10 and the Inception weights, verified by their hashes."""
