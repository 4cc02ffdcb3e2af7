#!/usr/bin/env python
"""Run pre-trainings and the fine-tunings that depend on them, on this machine or on SLURM."""

from region_pretrain.commands.sweep import main

if __name__ == "__main__":
    main()
