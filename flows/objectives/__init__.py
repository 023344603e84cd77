"""Training objectives, step-size schedules and couplings."""
