#!/usr/bin/env python
"""Check data sets before training: image files, boxes per class, and what is wrong with them."""

import sys

from region_pretrain.commands.check_data import main

if __name__ == "__main__":
    sys.exit(main())
