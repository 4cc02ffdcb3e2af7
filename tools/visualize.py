#!/usr/bin/env python
"""Draw the input of pre-training: the views of the first images, after photometric augmentation."""

from region_pretrain.commands.visualize import main

if __name__ == "__main__":
    main()
