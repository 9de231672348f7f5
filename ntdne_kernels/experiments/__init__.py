"""The paper's protocol on any archive: label noise, nine losses, training, evaluation, tables and figures.

The command `ntdne` is the way in (`ntdne --help`). Nothing in the core imports from here.
"""

import sys


def main() -> int:
    """The command `ntdne`; says what to install where the extra was left out."""
    try:
        from ntdne_kernels.experiments import cli

        return cli.main()
    except ModuleNotFoundError as error:
        print(f"ntdne: {error.name} is not installed; pip install 'ntdne_kernels[experiments]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ntdne: stopped", file=sys.stderr)
        return 130
