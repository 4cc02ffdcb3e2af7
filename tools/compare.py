#!/usr/bin/env python
"""Compare fine-tunings: their AP, its differences, and the settings that should be equal."""

from region_pretrain.commands.compare import main

if __name__ == "__main__":
    main()
