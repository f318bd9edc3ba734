"""`python -m ckpt_ema`, the same as the command `ckpt-ema`."""

from ckpt_ema.cli.app import main

if __name__ == "__main__":
    main()
