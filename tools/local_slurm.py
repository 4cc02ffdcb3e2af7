#!/usr/bin/env python
"""Run a command beside a real SLURM of two nodes on this machine, started and ended with it.

tools/local_slurm.py -- bash       # then: sinfo, tools/pretrain_net.py --slurm ..., squeue
tools/local_slurm.py --nodes 3 -- python my_test.py
"""

import argparse
import os
import subprocess
import sys
import tempfile

from region_pretrain.errors import exit_on_user_error
from region_pretrain.jobs.local_slurm import local_slurm


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes (2)")
    parser.add_argument("--cpus", type=int, default=4, help="that each node claims to have (4)")
    parser.add_argument("command", nargs="+", help="what to run")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="local_slurm_") as folder,
        local_slurm(folder, args.nodes, args.cpus) as env,
    ):
        code = subprocess.call(args.command, env={**os.environ, **env})
    sys.exit(code)


if __name__ == "__main__":
    main()
