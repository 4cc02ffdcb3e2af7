"""tools/make_regions.py as a command line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import skimage.data
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from forked import run_tool
from PIL import Image

from region_pretrain.commands import make_regions
from region_pretrain.data.catalog import get_records
from region_pretrain.data.generated import register_scenes
from region_pretrain.data.shapes import ShapesSpec
from region_pretrain.regions import RegionStore

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd):
    return run_tool("make_regions.py", *arguments, cwd=cwd)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "nested").mkdir(parents=True)
    Image.fromarray(skimage.data.astronaut()[:120, 150:300]).save(folder / "astronaut.jpg")
    Image.fromarray(skimage.data.chelsea()[80:200, 100:280]).save(folder / "nested" / "cat.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_folder_with_a_preview(tmp_path, photos):
    result = run(
        "--images", photos, "--out", "r.arrow", "--set", "min_side=20", "--set", "mode=single",
        "--working-size", 100, "--workers", 2, "--preview", 5, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    recipe = "soco-v1+min_side=20+mode=single+working_size=100"
    store = RegionStore.open(str(tmp_path / "r.arrow"))
    assert store.manifest["recipe"] == recipe
    assert sorted(store.keys()) == ["astronaut.jpg", "nested/cat.png"]
    assert store.size("nested/cat.png") == (180, 120)
    count = store.manifest["boxes"]
    assert count > 10
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"r.arrow: recipe {recipe}", "images: 2, and 0 unreadable files skipped"]
    assert lines[2].startswith(f"boxes:  {count}; per image: mean {count / 2:.1f}, median ")
    assert lines[3].startswith("time:   0.") and lines[3].endswith(" s per image and process")
    assert lines[4:] == ["r.arrow.preview.png"]
    with Image.open(tmp_path / "r.arrow.preview.png") as picture:
        assert picture.size == (800, 400)
    assert "2/2" in result.stderr  # progress


def test_a_store_keeps_its_recipe_if_no_other_is_given(tmp_path, photos, caplog, capsys):
    """Else the command for the preview would ask to delete hours of search."""
    caplog.set_level(logging.INFO)
    common = ["--images", str(photos), "--out", str(tmp_path / "r.arrow"), "--workers", "1"]
    make_regions.main([*common, "--working-size", "100", "--set", "mode=single"])
    boxes = RegionStore.open(str(tmp_path / "r.arrow")).manifest["boxes"]
    make_regions.main([*common, "--preview", "2"])
    assert (tmp_path / "r.arrow.preview.png").exists()
    assert "r.arrow has recipe soco-v1+mode=single+working_size=100" in caplog.text
    Image.new("RGB", (90, 60), "red").save(photos / "new.png")
    make_regions.main(common)
    store = RegionStore.open(str(tmp_path / "r.arrow"))
    assert "new.png" in store.keys() and store.manifest["boxes"] >= boxes
    assert store.manifest["recipe"] == "soco-v1+mode=single+working_size=100"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        make_regions.main([*common, "--recipe", "soco-v1"])
    assert "not with recipe soco-v1" in capsys.readouterr().err


def test_shards_and_then_one_more_call(tmp_path, photos, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    main = make_regions.main
    common = ["--images", "photos", "--out", "r.arrow", "--recipe", "grid-v1", "--part-size", "1"]
    main([*common, "--workers", "1", "--shard", "1/2"])
    assert "1 of 2 parts are complete" in caplog.text and capsys.readouterr().out == ""
    assert not (tmp_path / "r.arrow").exists()
    main([*common, "--workers", "1", "--shard", "0/2"])
    printed = capsys.readouterr().out
    assert "boxes:  68; per image: mean 34.0" in printed  # 9 + 25 windows
    main([*common, "--workers", "1", "--shard", "1/2"])
    assert capsys.readouterr().out == printed


def test_registered_data_set_with_its_recall(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    name = register_scenes(ShapesSpec("val", 3, side=48), "make_regions_val")
    try:
        make_regions.main(["--dataset", name, "--out", str(tmp_path / "r.arrow"),
                     "--recipe", "ground_truth-v1", "--workers", "1"])  # fmt: skip
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    printed = capsys.readouterr().out
    assert "images: 3, and 0 unreadable files skipped" in printed
    assert "1.000 at IoU 0.5, 1.000 at IoU 0.7" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "empty"], "has no images"),
        (["--images", "missing"], "no such image folder"),
        (["--dataset", "nowhere"], "no data set is called 'nowhere'"),
        (["--images", "photos", "--recipe", "soco"], "no recipe is called 'soco'"),
        (["--images", "photos", "--set", "min_side"], "FIELD=VALUE"),
        (["--images", "photos", "--set", "colour=3"], "no field 'colour'"),
        (["--images", "photos", "--set", "mode=slow"], "mode=slow"),
        (["--images", "photos", "--working-size", "big"], "working_size=big"),
        (["--images", "photos", "--shard", "3"], "--shard 3"),
        (["--images", "photos", "--shard", "2/2"], "0 <= i < n"),
        (["--images", "photos", "--preview", "0"], "--preview 0"),
        (["--images", "photos", "--shards", "3"], "for every I from 0 to 2"),
        (["--images", "photos", "--shard", "1/3", "--slurm", "nice"], "--shards 3 submits all"),
    ],
)
def test_invalid_arguments_end_with_one_line(
    tmp_path, photos, arguments, message, capsys, monkeypatch
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        make_regions.main([*arguments, "--out", "r.arrow"])
    assert exit_.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "r.arrow").exists() and not (tmp_path / "r.arrow.parts").exists()


def test_a_method_without_regions_is_refused(capsys):
    config = Path(__file__).parents[2] / "projects/MoCo/configs/moco-v2_r18_b32_shapes.py"
    with pytest.raises(SystemExit) as exit_:
        make_regions.main(["--config-file", str(config)])
    assert exit_.value.code == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(
            f"{config} needs no regions: start its pre-training, or give --out FILE "
            "and --recipe ID to make regions of its images anyway"
        )
    )


def test_a_job_array_over_shards(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/a.png")
    made = []
    monkeypatch.setattr(
        "region_pretrain.jobs.submission._submit", lambda jobs, *_: made.extend(jobs)
    )
    out = str(tmp_path / "x.arrow")
    array = ["--shards", "3", "--slurm", "partition=cpu,cpus-per-task=4"]
    recipe = ["--recipe", "ccop-v1", "--set", "mode=fast", "--working-size", "99", "--workers", "2"]
    make_regions.main(["--images", str(tmp_path / "images"), "--out", out, *recipe, *array])
    assert [job.arguments[-2:] for job in made] == [["--shard", f"{i}/3"] for i in range(3)]
    assert {job.resume for job in made} == {""} and len({job.output_dir for job in made}) == 3
    args = make_regions.make_parser().parse_args(made[1].arguments)
    assert (args.dataset, args.out) == ([f"folder://{tmp_path}/images"], out)
    assert (args.images, args.workers, args.register) == (None, 2, [])
    assert args.recipe == "ccop-v1" and sorted(args.set) == ["mode=fast", "working_size=99"]
    with pytest.raises(SystemExit):
        make_regions.main(
            ["--images", str(tmp_path / "images"), "--out", out, *array[:2], "--slurm", "a"]
        )
    assert "'a' is not of the form key=value" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        make_regions.main(["--images", str(tmp_path / "images"), "--out", out, "--dry-run"])
    assert "--dry-run shows what --slurm would submit" in capsys.readouterr().err


def test_labelled_data_by_path_and_registered_in_code(tmp_path, coco_folder, monkeypatch):
    monkeypatch.chdir(coco_folder)
    by_path, by_code = "coco://ann.json?images=images", "regions_by_code"
    (tmp_path / "register.py").write_text(
        "from detectron2.data.datasets import register_coco_instances\n"
        f"register_coco_instances({by_code!r}, {{}}, 'ann.json', 'images')\n"
    )
    code = ["--register", str(tmp_path / "register.py")]
    for name, extra in ((by_path, []), (by_code, code)):
        out = str(tmp_path / f"{len(extra)}.arrow")
        arguments = ["--out", out, "--workers", "1", "--recipe", "ground_truth-v1", *extra]
        make_regions.main(["--dataset", name, *arguments])
        store = RegionStore.open(out)
        for record in get_records(by_path):
            boxes = [(a["bbox"], a["bbox_mode"]) for a in record["annotations"]]
            expected = [BoxMode.convert(box, mode, BoxMode.XYXY_ABS) for box, mode in boxes]
            assert sorted(store.boxes(str(record["image_id"])).tolist()) == sorted(expected)
    DatasetCatalog.remove(by_code)

    # The jobs of shards know neither the config nor the working directory's names.
    args = make_regions.make_parser().parse_args(["--config-file", "x", "--out", "r.arrow", *code])
    made = make_regions._arguments(args, by_path, {})
    assert made == ["--dataset", by_path, *code, "--out", "r.arrow", "--max-unreadable", "0.01"]


@pytest.mark.parametrize("recipe", [[], ["--recipe", "grid-v1"]])
def test_a_photo_is_not_advised_to_be_deleted(photos, capsys, recipe):
    photo = photos / "astronaut.jpg"
    before = photo.read_bytes()
    with pytest.raises(SystemExit):
        make_regions.main(["--images", str(photos), "--out", str(photo), *recipe])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        f"error: {photo} is not a region store, but another file: choose another --out, or name "
        "another store"
    )
    assert photo.read_bytes() == before


def test_overrides_from_a_file_and_around_flags(tmp_path, capsys):
    (tmp_path / "more.txt").write_text("dataloader.train.dataset.names.size=3\n--workers\n1\n")
    config = ROOT / "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"
    make_regions.main(
        ["--config-file", str(config), "train.seed=1", "--out", str(tmp_path / "r.arrow")]
        + ["dataloader.train.dataset.recipe=grid-v1", f"@{tmp_path}/more.txt"]
    )
    assert "images: 3, and" in capsys.readouterr().out
