#!/usr/bin/env python
"""Compare recipes of regions by time per image and recall of annotated objects."""

from region_pretrain.commands.benchmark_regions import main

if __name__ == "__main__":
    main()
