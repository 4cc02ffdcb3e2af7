"""Names of data sets by path: parsed, made absolute, found in a config."""

import pytest
from omegaconf import OmegaConf

from region_pretrain.config import CONFIG_ROOT, load_config, to_yaml
from region_pretrain.dataset_names import (
    Source,
    absolute,
    folder_name,
    is_path_name,
    names_in,
    parse,
)
from region_pretrain.errors import UserError


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("folder:///a b/é", Source("folder", "/a b/é")),
        ("folder://", Source("folder", "")),
        ("coco://a.json?images=b=c/d&bits=12", Source("coco", "a.json", "b=c/d", "", {"bits": 12})),
        ("coco://a%3Fb.json?images=x%26y%25", Source("coco", "a?b.json", "x&y%")),
        (
            "voc:///VOC?split=val&bands=4,3,2",
            Source("voc", "/VOC", "", "val", {"bands": [4, 3, 2]}),
        ),
        (
            "folder:///photos?bands=5",
            Source("folder", "/photos", "", "", {"bands": [5]}),
        ),
        ("coco://~/a.json?images=~/b", Source("coco", "/home/me/a.json", "/home/me/b")),
    ],
)
def test_parse(name, source, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(name) == source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cocoo://a.json?images=b", r"there is no cocoo://; write folder://DIR, coco://ANN"),
        ("coco://a.json", r"has no images=: write coco://ANN.json\?images=DIR"),
        ("coco://?images=b", "has no path: write coco://"),
        ("coco://a.json?image=b", "no option 'image=b'; did you mean images="),
        (
            "coco://a.json?images=b&split=c",
            "no option 'split=c'; coco:// has images=, bits=",
        ),
        ("coco://a.json?images=", "images= needs one value"),
        ("coco://a.json?images=b&images=c", "images= needs one value"),
        ("voc://root", r"has no split=: write voc://ROOT\?split=NAME"),
        ("folder://what?", "no option ''; folder:// has bits=, bands=; in a path write %3F"),
        ("folder://a?bits=17", "bits=17 must be a number from 1 to 16"),
        ("folder://a?bits=x", "bits=x must be"),
        ("folder://a?bands=1,2", "bands=1,2 must be three numbers from 1"),
        ("folder://a?bands=0,1,2", "bands=0,1,2 must be three"),
    ],
)
def test_an_invalid_name_is_one_clear_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        parse(name)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("folder://x/../y", "folder:///here/y"),
        ("folder://~/x", "folder:///home/me/x"),
        ("folder://a%3Fb?bits=12", "folder:///here/a%3Fb?bits=12"),
        ("coco://a.json?images=b&bits=9", "coco:///here/a.json?images=/here/b&bits=9"),
        ("coco:///a.json?bits=9&images=b", "coco:///a.json?bits=9&images=/here/b"),
        ("voc://VOC?split=val", "voc:///here/VOC?split=val"),
        ("folder:///a//b/../c", "folder:///a//b/../c"),
        ("folder://s3://bucket/x", "folder://s3://bucket/x"),
        ("folder://", "folder://"),
    ],
)
def test_relative_paths_become_absolute(name, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("os.getcwd", lambda: "/here")
    assert absolute(name) == absolute(expected) == expected


def test_any_folder_has_a_name(tmp_path):
    path = f"{tmp_path}/50%3F off?&=é"
    assert parse(folder_name(path)).path == path
    assert is_path_name("coco:x") is False and is_path_name("objects:coco://a") is False


def test_a_saved_config_means_the_same_files_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "c.py").write_text(
        "from omegaconf import OmegaConf\n"
        "root = dict(path='mine')\n"
        "data = dict(names=['folder://a', 'plain'], again='${.names.0}', one='x')\n"
        "data['joined'] = 'folder://${root.path}/b'\n"
        "data['hooks'] = [dict(train_names='voc://v?split=s')]\n"
    )
    monkeypatch.chdir(tmp_path)
    cfg = load_config("c.py", ["data.one=coco://a.json?images=d e"])
    assert list(cfg.data.names) == [f"folder://{tmp_path}/a", "plain"]
    assert cfg.data.one == f"coco://{tmp_path}/a.json?images={tmp_path}/d e"
    assert cfg.data.hooks[0].train_names == f"voc://{tmp_path}/v?split=s"
    assert cfg.data.joined == f"folder://{tmp_path}/mine/b"
    assert "again: ${.names.0}" in to_yaml(cfg) and cfg.data.again == cfg.data.names[0]

    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config("../config.yaml") == cfg
    assert len(names_in(cfg)) == 4


def test_names_are_found_beside_null_and_missing_values():
    cfg = OmegaConf.create({"a": None, "b": "???", "c": "${d}", "d": {"e": ["folder://x", 3]}})
    assert names_in(cfg) == ["folder://x"]


def test_a_name_may_replace_a_list_of_names_on_the_command_line():
    names = "dataloader.train.dataset.names"
    path = str(CONFIG_ROOT / "detection/faster_rcnn_r50_c4_voc.py")
    cfg = load_config(path, [f"{names}=voc:///VOC?split=train&bands=4,3,2"])
    assert cfg.dataloader.train.dataset.names == "voc:///VOC?split=train&bands=4,3,2"
    cfg = load_config(path, [f"{names}=['coco:///a?images=/b','folder:///c']"])
    assert list(cfg.dataloader.train.dataset.names) == ["coco:///a?images=/b", "folder:///c"]
