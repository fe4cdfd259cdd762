"""`python -m fedsea`: the same as the `fedsea` command."""

import os
import sys

# `python -m` puts the current folder first among the places that modules come from, and it may hold anybody's files.
if not sys.flags.safe_path and sys.path[0] == os.getcwd():  # noqa: PTH109 - pathlib would be looked for there
    del sys.path[0]

from fedsea.cli import main

sys.exit(main())
