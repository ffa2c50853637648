"""``python -m scuvae`` is the command line."""

from scuvae.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
