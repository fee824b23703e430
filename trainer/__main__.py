"""The command `trainer`, and python -m trainer."""

import sys


def main() -> int:
    """Run the command; a Ctrl-C while it is still being imported is one line too."""
    try:
        from trainer import cli

        return cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C.\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
