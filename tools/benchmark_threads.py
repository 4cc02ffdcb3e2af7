#!/usr/bin/env python
"""Compare OpenMP settings for a training on the CPU, alone and beside another process."""

from region_pretrain.commands.benchmark_threads import main

if __name__ == "__main__":
    main()
