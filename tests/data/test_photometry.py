"""Every operation and the complete chain against torchvision, sample by sample."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from region_pretrain.data.photometry import (
    IDENTITY,
    CutOut,
    Photometry,
    PhotometryLayout,
    _plan,
    apply_photometry,
)
from region_pretrain.errors import UserError

AT = PhotometryLayout
JITTER = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
EVERYTHING = Photometry(
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.5,
    jitter_prob=0.8,
    gray_prob=0.2,
    blur_prob=0.5,
    solarize_prob=0.3,
)


def by_torchvision(image: torch.Tensor, params: np.ndarray) -> torch.Tensor:
    """One image ``(3, H, W)`` through torchvision's own functions."""
    for column in params[AT.FIRST : AT.GRAY].astype(int):
        if params[column] != IDENTITY[column]:
            image = JITTER[column](image, float(params[column]))
    if params[AT.GRAY]:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if sigma := float(params[AT.BLUR_SIGMA]):
        image = TF.gaussian_blur(image, kernel_size=2 * math.ceil(3 * sigma) + 1, sigma=sigma)
    if math.isfinite(params[AT.SOLARIZE_FROM]):
        image = TF.solarize(image, float(params[AT.SOLARIZE_FROM]))
    return image


def one_by_one(images: torch.Tensor, params: np.ndarray) -> torch.Tensor:
    pairs = zip(images, params, strict=True)
    return torch.stack([by_torchvision(image, row) for image, row in pairs])


def random_images(count: int, height: int = 24, width: int = 31, seed: int = 0) -> torch.Tensor:
    """8-bit images with edge cases: black, white, greys, pure colours, equal channels."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3, height, width))
    pixels[:, :, 0] = rng.integers(0, 256, (count, 1, width))  # grey
    pixels[:, :, 1] = rng.choice([0, 255], (count, 3, width))  # the colour cube's corners
    pixels[:, 1, 2] = pixels[:, 0, 2]  # two channels equal
    pixels[:, 2, 3] = pixels[:, 1, 3]
    return torch.from_numpy(pixels).float() / 255


def rows(count: int, **columns: float | list[float]) -> torch.Tensor:
    params = np.tile(IDENTITY, (count, 1))
    for name, values in columns.items():
        params[:, AT[name.upper()]] = values
    return torch.from_numpy(params)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("brightness", [0.0, 0.2, 0.9, 1.1, 1.4, 1.8]),
        ("contrast", [0.0, 0.2, 0.9, 1.1, 1.4, 1.8]),
        ("saturation", [0.0, 0.2, 0.9, 1.1, 1.4, 1.8]),
        ("hue", [-0.5, -0.31, -0.1, 0.02, 0.1, 0.5]),
        ("gray", [1, 0, 1, 0, 1, 1]),
        ("blur_sigma", [0.1, 0.34, 0.7, 1.0, 1.5, 2.0]),
        ("solarize_from", [0.0, 0.25, 0.5, 0.75, 1.0, math.inf]),
    ],
)
def test_operation_is_torchvisions(name, values):
    images, params = random_images(len(values)), rows(len(values), **{name: values})
    expected = one_by_one(images, params.numpy())
    torch.testing.assert_close(apply_photometry(images, params), expected, rtol=0, atol=1e-5)
    changed = (expected != images).flatten(1).any(1)
    assert changed.sum() >= 4  # the operation has an effect


def test_chain_is_torchvisions_sample_by_sample():
    rng = np.random.default_rng(7)
    params = np.stack([EVERYTHING.sample(rng) for _ in range(100)])
    # Solarisation is not continuous: rounding at the threshold may differ.
    params[:, AT.SOLARIZE_FROM] = np.inf
    images = random_images(100)
    out = apply_photometry(images, torch.from_numpy(params))
    expected = one_by_one(images, params)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)

    params[:, AT.SOLARIZE_FROM] = 0.5
    solarized = apply_photometry(images, torch.from_numpy(params))
    expected = one_by_one(images, params)
    clear = (out - 0.5).abs() > 1e-5
    assert clear.float().mean() > 0.99
    torch.testing.assert_close(solarized[clear], expected[clear], rtol=0, atol=1e-5)


def test_order_of_the_jitter_counts():
    """Brightness 2 then contrast 0 of a two-tone image, and the other way round, by hand."""
    image = torch.zeros(1, 3, 8, 8)
    image[..., :4] = 0.8
    params = rows(2, brightness=2, contrast=0)
    params[1, AT.FIRST], params[1, AT.SECOND] = AT.CONTRAST, AT.BRIGHTNESS
    first, second = apply_photometry(image.repeat(2, 1, 1, 1), params)
    luma = 0.2989 + 0.587 + 0.114
    torch.testing.assert_close(first, torch.full((3, 8, 8), 0.5 * luma))  # clipped to 1, averaged
    torch.testing.assert_close(second, torch.full((3, 8, 8), 0.8 * luma))  # averaged, doubled


def test_solarize_splits_8_bit_pixels_at_128():
    levels = torch.arange(256).float().div(255).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    out = apply_photometry(levels, rows(1, solarize_from=Photometry().solarize_threshold))
    values = (out[0, 0].flatten() * 255).round().int().tolist()
    assert values == [v if v < 128 else 255 - v for v in range(256)]


def test_blur_at_sigma_2_has_13_taps():
    image = torch.zeros(1, 3, 21, 21)
    image[..., 10, 10] = 1
    out = apply_photometry(image, rows(1, blur_sigma=2.0))[0, 0]
    kernel = np.exp(-(np.arange(-6, 7) ** 2) / 8)
    kernel /= kernel.sum()
    expected = np.zeros((21, 21))
    expected[4:17, 4:17] = np.outer(kernel, kernel)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-7)
    assert ((out > 0).numpy() == (expected > 0)).all()


@pytest.mark.parametrize("side", [2, 4, 6])
def test_blur_of_an_image_smaller_than_the_kernel(side):
    image = torch.rand(1, 3, side, side)
    out = apply_photometry(image.clone(), rows(1, blur_sigma=2.0))
    expected = TF.gaussian_blur(image, kernel_size=2 * side - 1, sigma=2.0)  # all that it reflects
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_a_sample_does_not_depend_on_its_neighbours(seed, count):
    rng = np.random.default_rng(seed)
    params = torch.from_numpy(np.stack([EVERYTHING.sample(rng) for _ in range(count)]))
    images = random_images(count, 9, 13, seed)
    before = images.clone()
    out = apply_photometry(images, params)
    assert torch.equal(images, before)
    assert out.min() >= 0 and out.max() <= 1
    for i in range(count):
        alone = apply_photometry(images[i : i + 1], params[i : i + 1])
        torch.testing.assert_close(out[i : i + 1], alone, rtol=0, atol=1e-6)


def test_identity_returns_the_input_exactly():
    images = random_images(4)
    assert apply_photometry(images, rows(4)) is images
    unchanged = Photometry().sample(np.random.default_rng(0))
    np.testing.assert_array_equal(unchanged, IDENTITY)
    # with a neighbour that does change
    params = rows(4, brightness=[1, 0.5, 1, 1], hue=[0, 0, 0, 0.25])
    out = apply_photometry(images, params)
    assert torch.equal(out[[0, 2]], images[[0, 2]])
    assert not torch.equal(out[1], images[1]) and not torch.equal(out[3], images[3])


def test_memory_format_and_large_groups_change_nothing():
    """Channels-last input; groups larger than one piece."""
    rng = np.random.default_rng(3)
    params = torch.from_numpy(np.stack([EVERYTHING.sample(rng) for _ in range(12)]))
    images = random_images(12, 128, 128)
    out = apply_photometry(images.contiguous(memory_format=torch.channels_last), params)
    for i in range(12):
        alone = apply_photometry(images[i : i + 1], params[i : i + 1])
        torch.testing.assert_close(out[i : i + 1], alone, rtol=0, atol=1e-6)


def test_sample_has_the_stated_distribution():
    rng = np.random.default_rng(11)
    photometry = Photometry(
        **{"brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.1, "jitter_prob": 0.8},
        **{"gray_prob": 0.2, "blur_prob": 0.5, "solarize_prob": 0.1},
    )
    params = np.stack([photometry.sample(rng) for _ in range(20000)])
    assert params.dtype == np.float32 and params.shape[1] == len(AT)

    jittered = params[params[:, AT.HUE] != 0]
    blurred = params[params[:, AT.BLUR_SIGMA] > 0]
    # four standard errors of a fraction of 20000 are at most 0.015
    assert abs(len(jittered) / 20000 - 0.8) < 0.015
    assert abs(params[:, AT.GRAY].mean() - 0.2) < 0.015
    assert abs(len(blurred) / 20000 - 0.5) < 0.015
    solarized = params[np.isfinite(params[:, AT.SOLARIZE_FROM])]
    assert abs(len(solarized) / 20000 - 0.1) < 0.015
    assert set(solarized[:, AT.SOLARIZE_FROM]) == {0.5}

    for column, low, high in (
        *((AT.BRIGHTNESS, 0.6, 1.4), (AT.CONTRAST, 0, 2.5)),
        *((AT.SATURATION, 0.8, 1.2), (AT.HUE, -0.1, 0.1)),
    ):
        quantiles = np.quantile(jittered[:, column], [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(
            quantiles, np.linspace(low, high, 5), atol=0.03 * (high - low), err_msg=column.name
        )
    quantiles = np.quantile(blurred[:, AT.BLUR_SIGMA], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quantiles, np.linspace(0.1, 2.0, 5), atol=0.06)

    orders = Counter(map(tuple, jittered[:, AT.FIRST : AT.GRAY].astype(int)))
    assert len(orders) == 24
    # 16000 / 24 = 667 each, standard deviation 25
    assert 560 < min(orders.values()) and max(orders.values()) < 780


def test_sample_consumes_the_same_random_numbers_in_every_case():
    never, always = np.random.default_rng(5), np.random.default_rng(5)
    Photometry().sample(never)
    Photometry(jitter_prob=1, gray_prob=1, blur_prob=1, solarize_prob=1, hue=0.1).sample(always)
    assert never.random() == always.random()


@pytest.mark.parametrize(
    "values",
    [
        {"brightness": -0.1},
        {"hue": 0.6},
        {"gray_prob": 1.2},
        {"blur_sigma": (2.0, 0.1)},
        {"blur_sigma": (0.0, 2.0)},
        {"solarize_threshold": 128},
    ],
)
def test_impossible_settings_are_named(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Photometry(**values)


def test_wrong_shapes_are_refused():
    images = random_images(2)
    with pytest.raises(ValueError, match="params"):
        apply_photometry(images, rows(3))
    with pytest.raises(ValueError, match="uint8"):
        apply_photometry((images * 255).byte(), rows(2))


def test_cut_out_squares_have_the_fill_colour_after_all_other_operations():
    images = random_images(3, 8, 10)
    squares = np.zeros((3, 8), np.float32)
    squares[0] = 2, 1, 5, 4, -2, 6, 2, 10  # the second one reaches out of the image
    squares[2] = 9, 0, 10, 1, 0, 0, 0, 0
    params, fill = rows(3, brightness=0.5), torch.full((3, 1, 1), 0.3)
    out = apply_photometry(images, torch.hstack([params, torch.from_numpy(squares)]), fill)
    expected = apply_photometry(images, params)
    expected[0, :, 1:4, 2:5] = expected[0, :, 6:, :2] = expected[2, :, :1, 9:] = 0.3
    assert torch.equal(out, expected)
    covered = [int((out[i] == fill).all(dim=0).sum()) for i in range(3)]
    assert covered == [9 + 4, 0, 1]


def test_a_cut_out_draws_the_same_numbers_in_every_case():
    never, always = np.random.default_rng(5), np.random.default_rng(5)
    boxes = np.array([[0, 0, 40, 10], [5, 5, 6, 6]], np.float32)
    empty = CutOut(Photometry(), boxes[:0], 3, 0.0, (0.1, 0.3)).sample(never)
    full = CutOut(Photometry(), boxes, 3, 1.0, (0.25, 0.25)).sample(always)
    assert never.random() == always.random()
    assert empty.shape == full.shape == (len(AT) + 12,) and not empty[len(AT) :].any()
    assert np.array_equal(full[: len(AT)], IDENTITY)
    first, second, third = full[len(AT) :].reshape(3, 4)
    assert (first[2:] - first[:2]).tolist() == [10, 10]  # sqrt(0.25 * 400)
    assert (second[2:] - second[:2]).tolist() == [1, 1]  # at least one pixel
    assert not third.any()


def test_a_batch_needs_seven_steps_for_the_jitter_whatever_its_orders():
    """Each step is a dozen GPU kernels; one per operation and place would be 16."""
    rng = np.random.default_rng(3)
    params = np.stack([EVERYTHING.sample(rng) for _ in range(300)])
    steps = list(_plan(params))
    names = [getattr(operation, "func", operation).__name__ for operation, _, _ in steps]
    assert names == [*["_blend"] * 3, "_hue", *["_blend"] * 3, "_gray", "_blur", "_solarize"]
    jittered = int((params[:, AT.HUE] != 0).sum())
    blends = sum(len(rows) for _, rows, _ in [*steps[:3], *steps[4:7]])
    assert jittered > 100 and len(steps[3][1]) == jittered and blends == 3 * jittered
