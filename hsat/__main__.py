"""`python -m hsat` is the command `hsat`."""

from __future__ import annotations

from hsat.cli.main import main

if __name__ == "__main__":
    main()
