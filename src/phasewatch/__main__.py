"""`python -m phasewatch` is `phasewatch`."""

from phasewatch.cli import main

if __name__ == "__main__":
    main()
