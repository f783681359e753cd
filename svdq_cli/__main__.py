"""`python -m svdq_cli` is `svdq`."""

from svdq_cli.cli import main

if __name__ == "__main__":
    main()
