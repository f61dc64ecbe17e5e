"""``python -m opkit``: the same as the ``opkit`` command."""

from opkit.cli import main

if __name__ == "__main__":
    main()
