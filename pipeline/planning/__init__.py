"""Plans: time, memory, disk and cost of every step, from a short measurement."""
