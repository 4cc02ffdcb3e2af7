#!/usr/bin/env python
"""Fine-tune a detector, from pre-trained or random weights, and evaluate it."""

from region_pretrain.commands.train_net import main

if __name__ == "__main__":
    main()
