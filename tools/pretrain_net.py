#!/usr/bin/env python
"""Pre-train a detector on unlabelled images."""

from region_pretrain.commands.pretrain_net import main

if __name__ == "__main__":
    main()
