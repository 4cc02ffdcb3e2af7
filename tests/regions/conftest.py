"""A small data set for the tests of region generation."""

import pytest
import skimage.data
from PIL import Image


@pytest.fixture
def records(tmp_path):
    """Eleven pieces of photographs, each of another size."""
    photos = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    folder = tmp_path / "images"
    folder.mkdir()
    result = []
    for i in range(11):
        piece = photos[i % 3][40 * (i // 3) :][:90, 50:][:, : 100 + 5 * i]
        Image.fromarray(piece).save(folder / f"{i:02d}.png")
        result.append({"file_name": str(folder / f"{i:02d}.png"), "image_id": f"im/{i}"})
    return result
