"""`python -m dither` is the command, so that `torchrun -m dither …` starts it on every rank."""

from dither.cli import main

if __name__ == "__main__":
    main()
