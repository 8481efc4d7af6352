"""Run the command line with `python -m safelora_fast`."""

from safelora_fast.cli import main

if __name__ == "__main__":
    main()
