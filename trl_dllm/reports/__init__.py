"""Likelihoods, floating-point operations and plots of a run."""
