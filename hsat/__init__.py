"""hsat."""
