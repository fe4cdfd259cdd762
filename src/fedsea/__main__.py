"""`python -m fedsea`: the same as the `fedsea` command."""

import sys

from fedsea.cli import main

sys.exit(main())
