"""``python -m mini_infer``: the same as the ``mini-infer`` command."""

import sys

from mini_infer.cli import main

if __name__ == "__main__":
    sys.exit(main())
