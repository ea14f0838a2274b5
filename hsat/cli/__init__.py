"""The command `hsat`: training, evaluations and reports, one module each."""
