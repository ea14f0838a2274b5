"""The contract of attacks: laws that hsat's own attacks keep, and that yours can be held against."""

from hsat.testing.laws import LAWS, check_attack
from hsat.testing.probes import DTYPES, check_feasible

__all__ = ["DTYPES", "LAWS", "check_attack", "check_feasible"]
