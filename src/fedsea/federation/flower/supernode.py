"""`python -m fedsea.federation.flower.supernode ARGUMENTS…`: Flower's SuperNode for data owners, as `flower-supernode`.

On standard output it prints `{"connected": NODE}` and `{"refused": WHY}`, and nothing else.
"""

import contextlib
import json
import os
from typing import Any

from fedsea.federation.flower import patches


def main() -> None:
    """Run the SuperNode."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(**body: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(body), file=out, flush=True)

    patches.supernode(tell)()


if __name__ == "__main__":
    main()
