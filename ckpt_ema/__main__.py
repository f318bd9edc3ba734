"""`python -m ckpt_ema`, the same as the command `ckpt-ema`."""

from ckpt_ema.cli import main

if __name__ == "__main__":
    main()
