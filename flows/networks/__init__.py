"""Velocity networks v(t, z), their conditions and their compositions."""
