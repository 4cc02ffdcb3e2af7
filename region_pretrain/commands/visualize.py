"""Draw the input of pre-training: the views of the first images, after photometric augmentation.

Each row is an image, each column a view. Boxes of the same colour and number are the same region in
several views; grey ones are in one view only. Methods whose network receives something else draw
that instead: for MCL, montages with one row per pyramid and one column per level; for point-level
region contrast, points. With --method the model draws its own picture, such as CCOP's candidate
boxes; see the project's README.

    %(prog)s --config-file projects/SoCo/configs/soco_r18-fpn_b32_shapes.py \\
        --num 3 dataloader.train.dataset.regions=null
"""

import argparse
import os

from detectron2.config import instantiate

from region_pretrain.commands import text_parser
from region_pretrain.config import check_parts, check_pretraining, load_config
from region_pretrain.data.folder import refuse_output_among_images
from region_pretrain.errors import UserError, exit_on_user_error
from region_pretrain.files import make_writable, write_atomic
from region_pretrain.reporting.boxes import to_png
from region_pretrain.reporting.pictures import first_views, model_pictures, pictures, sheet


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    parser.add_argument(
        "--config-file", metavar="FILE", required=True, help="a pre-training config"
    )
    parser.add_argument("--num", type=int, default=4, help="number of images (default 4)")
    parser.add_argument(
        "--output", metavar="FILE", default="views.png", help="PNG file (default views.png)"
    )
    parser.add_argument(
        "--height",
        type=int,
        default=224,
        help="height of a view in the picture in pixels (default 224)",
    )
    parser.add_argument("--method", action="store_true", help="draw the method's own picture")
    parser.add_argument(
        "--weights", metavar="FILE", default="", help="with --method: a checkpoint of the run"
    )
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Draw the picture."""
    args = make_parser(prog).parse_intermixed_args(argv)
    if args.num < 1 or args.height < 16:
        raise UserError(f"--num {args.num} --height {args.height}: must be at least 1 and 16")
    cfg = load_config(args.config_file, args.opts)
    check_parts(cfg, args.config_file, ("model", "dataloader.train"))
    check_pretraining(cfg)
    if args.weights and not args.method:
        raise UserError("--weights requires --method")
    if os.path.isdir(args.output) or not args.output.lower().endswith(".png"):
        raise UserError(f"--output {args.output}: name a file that ends in .png")
    refuse_output_among_images(args.output, instantiate(cfg.dataloader.train.dataset.names))
    make_writable(os.path.dirname(args.output), "the folder of --output")
    batch = first_views(cfg, args.num)
    draw = model_pictures(cfg, batch, args.weights) if args.method else pictures(cfg, batch)
    picture = sheet(draw, args.height)
    png = to_png(picture, max_width=picture.shape[1])
    write_atomic(args.output, lambda file: file.write(png))
    print(f"{args.output}: {args.num} images, {picture.shape[1]} x {picture.shape[0]} pixels")
