"""`python -m trl_ext`, and with it `torchrun -m trl_ext ...` and `accelerate launch -m trl_ext ...`."""

from trl_ext.cli import main

if __name__ == "__main__":
    main()
