"""Region generation as a job array on a real SLURM."""

import subprocess
import sys

import cv2
import pytest
from skimage import data
from slurm_runs import ROOT, wait_until

from region_pretrain.regions import RegionStore

pytestmark = pytest.mark.slurm


def test_a_job_array_generates_the_same_store_as_one_process(slurm, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        pixels = cv2.resize(getattr(data, name)(), (160, 120))
        cv2.imwrite(str(photos / f"{name}.png"), pixels[..., ::-1])

    def make(out, *more):
        command = [sys.executable, str(ROOT / "tools/make_regions.py"), "--images", str(photos)]
        command += ["--out", str(out), "--recipe", "soco-v1+mode=single", "--workers", "1", *more]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    settings = "partition=low,cpus-per-task=1,mem=1G"
    assert "submitted " in make(tmp_path / "array.arrow", "--shards", "2", "--slurm", settings)
    wait_until(lambda: not subprocess.check_output(["squeue", "--noheader"]), tmp_path)
    make(tmp_path / "one.arrow")
    array, one = (RegionStore.open(str(tmp_path / f"{n}.arrow")) for n in ("array", "one"))
    assert len(array) == len(one) == 4
    assert array.manifest["sha256"] == one.manifest["sha256"]
