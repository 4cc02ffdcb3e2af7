"""From a view's pixels to a backbone's input."""

import pytest
import torch

from region_pretrain.data.batch import View
from region_pretrain.data.photometry import IDENTITY, PhotometryLayout
from region_pretrain.modeling.preprocess import Preprocess


def make_view(images: torch.Tensor, params: torch.Tensor) -> View:
    nothing = torch.zeros(len(images), 0)
    return View(images, nothing, nothing, nothing, nothing, params)


@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
def test_cut_out_pixels_are_zero_after_normalisation(input_format):
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    if input_format == "BGR":
        mean, std = mean[::-1], std[::-1]
    images = torch.randint(200, 256, (1, 3, 6, 6), dtype=torch.uint8)
    params = torch.tensor([[*IDENTITY.tolist(), 1.0, 2.0, 4.0, 5.0]])
    out = Preprocess(mean, std, input_format)(make_view(images, params))
    torch.testing.assert_close(out[0, :, 2:5, 1:4], torch.zeros(3, 3, 3), atol=1e-6, rtol=0)
    assert int((out[0] > 1).all(dim=0).sum()) == 36 - 9
    plain = Preprocess(mean, std, input_format)(make_view(images, params[:, :-4]))
    torch.testing.assert_close(out[0, :, :2], plain[0, :, :2], atol=0, rtol=0)


def test_views_together_are_the_views_one_by_one():
    """Two sizes, and parameters with and without squares: three passes for five views."""
    generator = torch.Generator().manual_seed(1)
    views = []
    for side, squares, count in ((8, 0, 2), (6, 0, 2), (8, 1, 2), (8, 0, 3), (6, 0, 2)):
        shape = count, 3, side, side
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        params = torch.tensor([[*IDENTITY.tolist(), *[1.0, 1.0, 3.0, 3.0] * squares]] * count)
        params[0, PhotometryLayout.CONTRAST] = 0.5
        params[-1, PhotometryLayout.HUE] = 0.2
        views.append(make_view(images, params))
    preprocess = Preprocess([120.0, 110.0, 100.0], [58.0, 57.0, 56.0], "RGB")
    expected = [preprocess(view) for view in views]
    passes = []
    preprocess.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    found = preprocess.together(views)
    assert passes == [5, 4, 2] and len(found) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
