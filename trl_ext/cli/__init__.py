"""The command line `trl-ext`."""


def main() -> None:
    """Entry point of `trl-ext`."""
