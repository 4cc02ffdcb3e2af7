#!/usr/bin/env python
"""Make the regions of a data set for pre-training, and write them to a region store."""

from region_pretrain.commands.make_regions import main

if __name__ == "__main__":
    main()
