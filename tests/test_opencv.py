"""OpenCV's threads, which a forked process does not have."""

import cv2
import numpy as np
import pytest
from forked import LONG, Process

from region_pretrain.regions.generate import make_regions
from region_pretrain.system import one_opencv_thread


@pytest.fixture
def opencv_threads():
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((500, 500, 3), np.uint8), (31, 31), 5)  # starts them
    yield
    cv2.setNumThreads(before)


def test_one_thread_within_the_context(opencv_threads):
    with one_opencv_thread():
        assert cv2.getNumThreads() == 1
        with one_opencv_thread():
            pass
        assert cv2.getNumThreads() == 1
    assert cv2.getNumThreads() == 2


def test_a_forked_process_makes_regions(region_folder, tmp_path, opencv_threads):
    records = [
        {"file_name": str(path), "image_id": path.name}
        for path in sorted(region_folder.images.iterdir())
    ]

    def make():
        make_regions(records, str(tmp_path / "grid.arrow"), "grid-v1", workers=1)

    process = Process(make, tmp_path / "out.txt")
    assert process.wait(LONG) == 0, (tmp_path / "out.txt").read_text()
