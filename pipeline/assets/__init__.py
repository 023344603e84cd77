"""MNIST, CIFAR-10 and the Inception weights: fetched and verified."""
