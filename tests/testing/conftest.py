"""The tests of wrong attacks share what these attacks are made from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
