"""What the tests of decoding share."""

import sys
from pathlib import Path

import numpy as np
import pytest

from region_pretrain.images import EncodedImage

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def check_size():
    """Check that the size in the header is the size of the decoded pixels."""

    def check(path: str, image: np.ndarray) -> None:
        assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
        assert EncodedImage.read(path).size() == (image.shape[1], image.shape[0])

    return check
