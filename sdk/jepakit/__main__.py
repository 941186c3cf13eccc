"""`python -m jepakit`: the command, where the environment's scripts are not on the PATH."""

from jepakit.cli import main

if __name__ == "__main__":  # processes that training spawns import this module, too
    main()
