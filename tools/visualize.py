#!/usr/bin/env python
"""Draw what a pre-training sees: the views of its first images, after photometry.

A line is an image, a column a view. Boxes of one colour and number are the same region, and are
matched; grey ones are in one view only. A method may draw what it makes of its views instead: MCL
its montages, a line a pyramid, a column a level, with the image of each tile; point-level region
contrast its points. With --method it is what the model draws of its own, such as CCOP's candidate
boxes; the project's README says what.
"""

import argparse
import os

from region_pretrain.warnings import ignore_library_warnings

ignore_library_warnings()

from detectron2.utils.file_io import PathManager

from region_pretrain.config import load_config
from region_pretrain.errors import UserError, exit_on_user_error
from region_pretrain.reporting.pictures import (
    first_views,
    model_pictures,
    pictures,
    sheet,
)
from region_pretrain.reporting.plots import to_png


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="a pre-training config")
    parser.add_argument("--num", type=int, default=4, help="images (default 4)")
    parser.add_argument("--output", default="views.png", help="the PNG (default views.png)")
    parser.add_argument("--height", type=int, default=224, help="of a view in the picture")
    parser.add_argument("--method", action="store_true", help="draw what is the method's own")
    parser.add_argument("--weights", default="", help="with --method: a checkpoint of a run")
    parser.add_argument("opts", nargs="*", help="key=value for a key of the config")
    args = parser.parse_args()
    if args.num < 1 or args.height < 16:
        raise UserError(f"--num {args.num} --height {args.height}: at least 1 and 16")
    cfg = load_config(args.config_file, args.opts)
    if args.weights and not args.method:
        raise UserError("--weights goes with --method")
    batch = first_views(cfg, args.num)
    draw = model_pictures(cfg, batch, args.weights) if args.method else pictures(cfg, batch)
    picture = sheet(draw, args.height)
    PathManager.mkdirs(os.path.dirname(args.output) or ".")
    with PathManager.open(args.output, "wb") as file:
        file.write(to_png(picture, max_width=picture.shape[1]))
    print(f"{args.output}: {args.num} images, {picture.shape[1]} x {picture.shape[0]} pixels")


if __name__ == "__main__":
    main()
