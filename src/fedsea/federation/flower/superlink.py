"""`python -m fedsea.federation.flower.superlink ARGUMENTS…`: `flower-superlink`, behind a gate."""

from fedsea.federation.flower import patches
from fedsea.process import raise_file_limit


def main() -> None:
    """Run the SuperLink."""
    run = patches.superlink()
    raise_file_limit()
    run()


if __name__ == "__main__":
    main()
