"""Pre-train a small Mask R-CNN without labels on generated images, fine-tune it on 100 labelled
images, and compare it with random weights. The results are in output/demo of this folder.

    %(prog)s                          # about 10 minutes on two CPU cores
    %(prog)s sweep.seeds=[0,1,2]      # three seeds

It is the sweep configs/sweeps/demo.py, whose settings can be overridden. An interrupted demo
resumes when it is started again.
"""

from __future__ import annotations

import argparse

from region_pretrain.commands import sweep, text_parser


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    parser.add_argument("opts", nargs="*", metavar="sweep.key=value", help="overrides of the sweep")
    return parser


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run the demo and wait for its end."""
    args = make_parser(prog).parse_args(argv)
    demo = ["--config", "configs/sweeps/demo.py", "--wait"]
    sweep.main([*demo, *args.opts], "region-pretrain sweep")
