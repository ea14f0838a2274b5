"""Adversarial patches as files, and the accuracy on those files."""
