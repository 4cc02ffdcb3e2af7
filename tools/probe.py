#!/usr/bin/env python
"""Classify labelled regions by kNN and by a linear classifier on frozen features."""

from region_pretrain.commands.probe import main

if __name__ == "__main__":
    main()
