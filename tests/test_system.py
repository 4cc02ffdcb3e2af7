"""What the machine offers."""

import pytest

from region_pretrain import system


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("0, 2,", ["0", "2"]),
        ("GPU-8f3a,MIG-12", ["GPU-8f3a", "MIG-12"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("NoDevFiles", []),
    ],
)
def test_visible_gpus(monkeypatch, given, found):
    """CUDA ignores all that follow one that it does not know."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert system.gpus() == found
