"""Certified robustness by randomised smoothing."""
