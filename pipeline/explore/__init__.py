"""Explorer: a page in the browser that samples from a run and inverts images."""
