"""ODE solvers and divergence estimators."""
