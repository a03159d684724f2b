"""``python -m epic_fast`` is the command ``epic-fast``."""

from epic_fast.cli import main

if __name__ == "__main__":
    main()
