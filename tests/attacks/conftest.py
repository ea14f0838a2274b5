"""The tests of other libraries' attacks share stand-ins for them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
