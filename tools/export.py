#!/usr/bin/env python
"""Write a detector's weights for another library, and print the configuration that they need."""

from region_pretrain.commands.export import main

if __name__ == "__main__":
    main()
