"""Attackers who may alter only some patches of a slide or patient."""
