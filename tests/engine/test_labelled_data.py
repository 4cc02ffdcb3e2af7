"""The number of classes: from the data unless it is given, and then compared."""

import copy
import json
from contextlib import nullcontext

import pytest
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import get_detection_dataset_dicts as get_dicts
from detectron2.evaluation import CityscapesInstanceEvaluator
from detectron2.model_zoo import get_config as get_detectron2_config
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils import comm
from omegaconf import OmegaConf
from tiny_run import NoisyMapper

from region_pretrain.config import get_config, load_config, to_yaml
from region_pretrain.engine.labelled_data import (
    Classes,
    check_labelled_data,
    compare_with_checkpoint,
)
from region_pretrain.engine.transfer import TransferReport
from region_pretrain.errors import UserError

HEADS = "model.roi_heads.num_classes"


@pytest.fixture
def data(coco_folder):
    """Data sets by path with 3 classes (dog, ant, cat), and variants of the json."""

    def make(name="ann", edit=lambda categories: None):
        content = json.loads((coco_folder / "ann.json").read_text())
        edit(content["categories"])
        (coco_folder / f"{name}.json").write_text(json.dumps(content))
        return f"coco://{coco_folder}/{name}.json?images={coco_folder}/images"

    return make


@pytest.fixture
def registered(request):
    """Registers records with given category ids, without class names."""
    name = f"bare_{request.node.name}"
    box = {"bbox": [0, 0, 4, 4], "bbox_mode": 0}
    DatasetCatalog.register(
        name,
        lambda: [{"file_name": "x", "annotations": [{**box, "category_id": i}]} for i in (0, 4)],
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name, None)


def make_config(train, test, classes, mapper=DatasetMapper):
    def loader(names):
        return {"dataset": L(get_dicts)(names=names), "mapper": L(mapper)()}

    return OmegaConf.create(
        {
            "model": {
                "roi_heads": {"num_classes": classes, "mask": {"num_classes": "${..num_classes}"}},
                "sem_seg_head": {"num_classes": 54},
            },
            "dataloader": {"train": loader(train), "test": loader(test), "evaluator": {}},
            "train": {"register": []},
        },
        flags={"allow_objects": True},
    )


@pytest.mark.parametrize("training", [True, False])
def test_null_follows_the_data_and_numbers_are_compared(data, training, caplog):
    cfg = make_config(data(), data(), None)
    classes = check_labelled_data(cfg, training)
    assert cfg.model.roi_heads.num_classes == cfg.model.roi_heads.mask.num_classes == 3
    assert cfg.model.sem_seg_head.num_classes == 54
    line = f"{data()}: 6 images, 12 boxes (dog 4, ant 4, cat 4)"
    assert classes == Classes(["dog", "ant", "cat"], [data()], [HEADS], (line,))
    caplog.set_level("INFO")
    caplog.clear()
    classes.log()
    assert caplog.messages == [
        line,
        f"{HEADS}=3 follows from the data; 3 classes: dog, ant, cat",
    ]

    assert check_labelled_data(make_config(data(), data(), 3), training).followed == []
    for number in (2, 5):
        with pytest.raises(UserError) as error:
            check_labelled_data(make_config(data(), data(), number), training)
        assert str(error.value) == (
            f"{HEADS}={number}, but {data()} has 3 classes (dog, ant, cat): set {HEADS}=3, or null "
            "to follow the data"
        )


@pytest.mark.parametrize("training", [True, False])
def test_the_heads_within_the_roi_heads_have_their_number_of_classes(data, training, caplog):
    def check(heads, number=None):
        cfg = make_config(data(), data(), number)
        cfg.model.roi_heads.update(heads)
        return check_labelled_data(cfg, training)

    predictor = L(FastRCNNOutputLayers)(num_classes="${model.roi_heads.num_classes}")
    own = L(NoisyMapper)(num_classes=30)
    assert check({"box_predictor": [predictor, predictor], "attributes": own}).followed == [HEADS]
    assert "model.roi_heads.attributes.num_classes=30, but" in caplog.text
    check({"mask": {"num_classes": 1}})  # class-agnostic
    wrong = L(FastRCNNOutputLayers)(num_classes=80)
    for heads, key, number in (
        ({"box_predictor": wrong}, "box_predictor", 80),
        ({"box_predictor": [predictor, wrong]}, "box_predictor.1", 80),
        ({"box_predictor": {"num_classes": 1}}, "box_predictor", 1),
        ({"mask": {"num_classes": 2}}, "mask", 2),
    ):
        for classes in (None, 3):
            with pytest.raises(UserError) as error:
                check(heads, classes)
            key_ = f"model.roi_heads.{key}.num_classes"
            assert str(error.value) == f"{key_}={number}, but {HEADS}=3: set {key_}=3"


def test_an_evaluation_needs_only_the_test_data(data):
    cfg = make_config("no_such_data_set", data(), None)
    assert check_labelled_data(cfg, training=False).names == ["dog", "ant", "cat"]
    with pytest.raises(UserError, match="no data set is called 'no_such_data_set'"):
        check_labelled_data(cfg, training=True)


def test_training_and_test_data_have_the_same_classes(data):
    def rename(categories):
        categories[0]["name"] = "lion"

    renamed = data("renamed", rename)
    longer = data("longer", lambda categories: categories.append({"id": 99, "name": "z"}))
    with pytest.raises(UserError, match=r"differ: class 2 is 'cat' and 'lion'$"):
        check_labelled_data(make_config(data(), renamed, None), True)
    with pytest.raises(UserError, match=r"differ: 4 and 3 classes; class 3 is 'z' and missing$"):
        check_labelled_data(make_config(longer, data(), None), True)
    with pytest.raises(UserError, match=r"^dataloader.train: the classes of .*'cat' and 'lion'$"):
        check_labelled_data(make_config([data(), renamed], data(), None), True)


def test_without_class_names_the_largest_id_is_compared(registered):
    check_labelled_data(make_config(registered, registered, 5), True)
    check_labelled_data(make_config(registered, registered, 9), True)
    with pytest.raises(UserError, match=f"{HEADS}=4, but .* has boxes with category_id=4"):
        check_labelled_data(make_config(registered, registered, 4), True)
    with pytest.raises(UserError, match=f"{HEADS} is null, but {registered} has no class names"):
        check_labelled_data(make_config(registered, registered, None), True)


def test_a_mapper_of_the_users_own_may_map_all_classes_to_one(data, caplog):
    check_labelled_data(make_config(data(), data(), 1, NoisyMapper), True)
    assert f"{HEADS}=1, but {data()} has 3 classes" in caplog.text


def test_a_test_set_given_as_a_list(data):
    """The evaluator's name refers to it."""
    cfg = make_config(data(), [data()], 3)
    cfg.dataloader.evaluator = {"dataset_name": "${..test.dataset.names}"}
    check_labelled_data(cfg, True)
    assert cfg.dataloader.evaluator.dataset_name == data()
    cfg = make_config(data(), [data(), data("other")], 3)
    cfg.dataloader.evaluator = {"dataset_name": "${..test.dataset.names}"}
    with pytest.raises(UserError, match="dataloader.test.dataset.names=.*is of one data set"):
        check_labelled_data(cfg, True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_mappers_read_the_channel_order_of_the_model(data, split):
    cfg = make_config(data(), data(), 3)
    cfg.model.input_format = "RGB"
    for loader in (cfg.dataloader.train, cfg.dataloader.test):
        loader.mapper.image_format = "RGB"
    check_labelled_data(cfg, True)
    cfg.dataloader[split].mapper.image_format = "BGR"
    for training in (True, False):
        with pytest.raises(UserError) as error:
            check_labelled_data(cfg, training)
        assert str(error.value).startswith(
            f"model.input_format=RGB, but dataloader.{split}.mapper.image_format=BGR: set both to"
        )
    cfg.model.input_format = None
    check_labelled_data(cfg, True)


def test_a_format_that_the_detector_does_not_take_is_refused(data):
    cfg = make_config(data(), data(), 3)
    cfg.model = get_config("detection/fcos_r50_fpn.py").model
    cfg.model.num_classes = cfg.model.head.num_classes = 3
    check_labelled_data(cfg, True)
    cfg.model.input_format = None
    with pytest.raises(UserError, match="model.input_format=None: FCOS has no argument of this"):
        check_labelled_data(cfg, True)


def test_models_and_data_without_these_keys(data):
    cfg = make_config(data(), data(), 3)
    cfg.model = {"backbone": {}}
    assert check_labelled_data(cfg, True).followed == []
    cfg.dataloader.train = cfg.dataloader.test = {"dataset": {}}
    assert check_labelled_data(cfg, True) == Classes([], [], [])
    with pytest.raises(UserError, match="a folder has no boxes"):
        check_labelled_data(make_config("folder://x", data(), 3), True)


@pytest.mark.parametrize(
    ("zoo", "keys"),
    [
        ("COCO-Detection/retinanet_R_50_FPN_1x.py", ["model.num_classes"]),
        ("COCO-Detection/fcos_R_50_FPN_1x.py", ["model.num_classes"]),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py", [HEADS]),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py", [HEADS]),
    ],
)
def test_new_training_data_decides_over_the_configs_number(zoo, keys, data, tmp_path):
    cfg = get_detectron2_config(zoo)
    del cfg.lr_multiplier  # some of them cannot be saved
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(cfg))
    names = f"dataloader.train.dataset.names={data()}"
    changed = load_config(str(path), [names])
    test = f"dataloader.test.dataset.names={data()}"
    for key in keys:
        assert OmegaConf.select(changed, key) is None
        assert OmegaConf.select(load_config(str(path), [test]), key) == 80
        assert OmegaConf.select(load_config(str(path), [names, f"{key}=7"]), key) == 7
    if "PanopticSeg" in zoo:
        assert changed.model.sem_seg_head.num_classes == 54
    for override in ("dataloader.train.total_batch_size=4", "dataloader.test.num_workers=0"):
        unchanged = load_config(str(path), [override])
        assert all(OmegaConf.select(unchanged, key) == 80 for key in keys)


def test_a_lazy_name_or_a_whole_data_set_are_new_data_too(data, tmp_path):
    cfg = make_config(["a"], "b", 80)
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    for override, expected in (
        (f"dataloader.train.dataset.names.0={data()}", None),
        (f"dataloader.train.dataset={{_target_: x, names: '{data()}'}}", None),
        ("+dataloader.train.dataset.filter_empty=false", 80),
    ):
        changed = load_config(str(tmp_path / "config.yaml"), [override])
        assert changed.model.roi_heads.num_classes == expected, override


def test_class_names_in_checkpoints(caplog):
    classes = Classes(["dog", "ant", "cat"], ["mine"], [])
    layer = "roi_heads.box_predictor.cls_score.weight"
    report = TransferReport("a.pth", matched=[layer], classes=list(classes.names))
    for same in (report, TransferReport("zoo.pkl", matched=[layer])):
        compare_with_checkpoint(same, classes, training=False)
        compare_with_checkpoint(same, classes, training=True)
    report.classes = ["ant", "dog", "cat"]
    message = "a.pth was trained on other classes than those of mine: class 0 is 'ant'"
    with pytest.raises(UserError, match=message):
        compare_with_checkpoint(report, classes, training=False)
    assert caplog.messages == []
    compare_with_checkpoint(report, classes, training=True)
    assert message in caplog.text
    caplog.clear()
    # New predictors: of another number of classes, or not in the checkpoint.
    for other in (["ant"], ["ant", "dog", "cat"]):
        new = copy.copy(report)
        new.classes, new.matched = other, [layer] if len(other) == 1 else ["backbone.x"]
        compare_with_checkpoint(new, classes, training=True)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "MODEL.RETINANET.NUM_CLASSES"),
    ],
)
def test_classes_of_a_yacs_detector(data, config, key):
    sets = [f"DATASETS.TRAIN={data()}", f"DATASETS.TEST={data()}"]
    cfg = load_config(config, sets)
    classes = check_labelled_data(cfg, training=True)
    assert classes.followed == [f"model.cfg.{key}"]
    assert OmegaConf.select(cfg, f"model.cfg.{key}") == 3
    others = {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"} - {key}
    assert OmegaConf.select(cfg, f"model.cfg.{others.pop()}") == 80  # not this detector's

    message = f"{key}=7, but .* has 3 classes .dog, ant, cat.: set {key}=3$"
    with pytest.raises(UserError, match=message):
        check_labelled_data(load_config(config, [*sets, f"{key}=7"]), training=True)
    assert check_labelled_data(load_config(config, [*sets, f"{key}=3"]), True).followed == []


def test_cityscapes_is_evaluated_on_one_machine(data, monkeypatch):
    """Detectron2 asserts it at the end of the training."""
    cfg = make_config(data(), data(), None)
    cfg.dataloader.evaluator = L(CityscapesInstanceEvaluator)(
        dataset_name="${..test.dataset.names}"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    for here in (4, 2):
        monkeypatch.setattr(comm, "get_local_size", lambda here=here: here)
        with (
            nullcontext() if here == 4 else pytest.raises(UserError, match="on one machine: train")
        ):
            check_labelled_data(cfg, training=True)
