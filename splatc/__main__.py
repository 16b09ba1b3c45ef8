"""``python -m splatc``."""

from splatc.cli.main import main

if __name__ == "__main__":
    main()
