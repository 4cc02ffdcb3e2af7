"""``python -m region_pretrain``: the same as ``region-pretrain``."""

import sys

from region_pretrain.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
