#!/usr/bin/env python
"""Measure a pre-training config on this machine: the loader compared with JPEG decoding alone, and
the training step compared with forward and backward of the networks alone."""

from region_pretrain.commands.benchmark import main

if __name__ == "__main__":
    main()
