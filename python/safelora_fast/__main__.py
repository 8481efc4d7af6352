"""`python -m safelora_fast` is the command line."""

from safelora_fast.cli import main

if __name__ == "__main__":
    main()
