"""``python -m region_pretrain``: the same as ``region-pretrain``."""

import sys

from region_pretrain.commands.cli import main

__spec__ = None  # spawned processes then import this file, and hide library warnings too

if __name__ == "__main__":
    sys.exit(main())
