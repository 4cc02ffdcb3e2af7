"""Weights of a sweep are published with cards, and ``zoo://NAME`` loads wherever weights do."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.utils.file_io import PathManager

import region_pretrain as rp
from region_pretrain import zoo
from region_pretrain.commands.sweep import main
from region_pretrain.config import load_config
from region_pretrain.convert.export import write_export
from region_pretrain.engine.finetune import do_train
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import UserError
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import state
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN, Plan, Run
from region_pretrain.sweeps.zoo import write_zoo

ROOT = Path(__file__).parents[2]
RECIPE = "projects/MoCo/configs/moco-v2_r18_b32_shapes.py"
DETECTOR = "configs/detection/mask_rcnn_r18_fpn_shapes.py"
SHAPES = "{_target_:region_pretrain.data.shapes.shapes,split:%s,size:%d,side:64,level:easy}"
NAME = "moco-v2_r18_b32_shapes"
CPU = ["train.device=cpu", "dataloader.train.num_workers=0", "train.log_period=1"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep folder with one pre-training of two steps, and its fine-tuning of one."""
    root = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root / "datasets"))
        folder = root / "sweep"
        pre, det = folder / "runs/moco_seed0", folder / "runs/moco_seed0_det"
        data = f"dataloader.train.dataset.names={SHAPES % ('unlabeled', 12)}"
        overrides = [
            *CPU, data, "dataloader.train.total_batch_size=4", "model.queue.length=64",
            "dataloader.train.dataset.views.size=32", "train.max_iter=2",
        ]  # fmt: skip
        do_pretrain(load_config(str(ROOT / RECIPE), [*overrides, f"train.output_dir={pre}"]))
        overrides = [
            *CPU,
            f"dataloader.train.dataset.names={SHAPES % ('train', 6)}",
            f"dataloader.test.dataset.names={SHAPES % ('val', 4)}",
            f"train.init_checkpoint={pre}/model_final.pth",
            "dataloader.train.total_batch_size=2",
            "train.max_iter=1",
            "optimizer.lr=0.05",
            f"train.output_dir={det}",
        ]
        results = do_train(load_config(str(ROOT / DETECTOR), overrides))
        plan = Plan()
        for kind, name, config, path, product in (
            (PRETRAIN, "moco_seed0", RECIPE, pre, "model_final.pth"),
            (FINETUNE, "moco_seed0_det", DETECTOR, det, "results.json"),
        ):
            task = ("--config-file", str(ROOT / config))
            plan.runs[name] = Run(
                name, kind, name, "tools/x.py", (task,), str(path), str(path / product)
            )
        plan.entries = [
            {"kind": PRETRAIN, "run": "moco_seed0", "init": "moco", "seed": 0},
            {"kind": FINETUNE, "run": "moco_seed0_det", "init": "moco", "seed": 0,
             "pretrain_seed": 0, "finetune": "det", "label_fraction": 1.0, "checkpoint": "final"},
        ]  # fmt: skip
        file = state.SweepFile(
            "zoo", "Zoo", "", Cluster(kind="local"), str(ROOT), str(ROOT), {"moco": "MoCo v2"},
            None, plan, methods={"moco": "MoCo v2"},
        )  # fmt: skip
        state.write_sweep(str(folder), file)
        yield folder, results


@pytest.fixture
def published(sweep, tmp_path, monkeypatch):
    """The folder of the published weights, which is searched for names."""
    monkeypatch.chdir(tmp_path)
    paths = write_zoo(str(sweep[0]), zoo.DEFAULT_FOLDER)
    assert paths[0] == "output/zoo/metafile.yml" and len(paths) == 2
    return Path(tmp_path / "output/zoo")


def test_the_commands_take_names(published, tmp_path):
    """In a new process, in which nothing else has registered zoo://."""
    tool = [sys.executable, str(ROOT / "tools/export.py"), f"zoo://{NAME}", "--to", "detectron2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*tool, "--out", "x.pth"], check=True, env=environment)
    paths = "x.pth", zoo.read_card(NAME).weights
    mine, theirs = (torch.load(path, weights_only=True)["model"] for path in paths)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_card_says_how_the_weights_were_made(sweep, published):
    card = rp.read_card(NAME)
    assert card.weights == f"output/zoo/{NAME}-{card.sha256[:8]}.pth"
    assert hashlib.sha256(Path(card.weights).read_bytes()).hexdigest() == card.sha256
    assert (card.collection, card.config) == ("MoCo v2", RECIPE)
    assert card.paper == {"Title": "MoCo v2", "URL": "https://arxiv.org/abs/2003.04297"}
    facts = card.metadata
    assert facts["Training Data"].startswith("shapes_unlabeled_12x64px_seed0")
    assert (facts["Iterations"], facts["Batch Size"], facts["Images Seen"]) == (2, 4, 8)
    assert (facts["Seed"], facts["Detector"]) == (0, DETECTOR)
    assert facts["File Size"] == os.path.getsize(card.weights)
    assert facts["Library Versions"]["torch"] == torch.__version__
    boxes, masks = card.results
    assert boxes["Task"] == "Object Detection" and masks["Task"] == "Instance Segmentation"
    assert boxes["Dataset"].startswith("shapes_val_4x64px")
    assert boxes["Metrics"]["box AP"] == round(sweep[1]["bbox"]["AP"], 2)
    how = boxes["Fine-tuning"]
    assert (how["Config"], how["Labelled Images"], how["Iterations"]) == (DETECTOR, 6, 1)
    assert how["Learning Rate"] == "0.05"
    content = yaml.safe_load((published / "metafile.yml").read_text())
    assert list(content) == ["Collections", "Models"]
    assert content["Collections"][0]["README"] == "projects/MoCo/README.md"


def trunk_of(sweep):
    saved = torch.load(sweep[0] / "runs/moco_seed0/model_final.pth", weights_only=True)["model"]
    assert len(saved) > 50
    return saved


def test_pre_trainings_of_one_config_have_names_of_their_own(sweep, tmp_path):
    """Such as those that differ in length or in their regions."""
    folder = tmp_path / "two"
    shutil.copytree(sweep[0], folder)
    file = state.read_sweep(str(folder))
    file.plan.entries.append({"kind": PRETRAIN, "run": "moco_seed0", "init": "moco_4", "seed": 0})
    file.labels["moco_4"], file.methods["moco_4"] = "MoCo v2, 4 images", "MoCo v2"
    state.write_sweep(str(folder), file)
    metafile, *weights = write_zoo(str(folder), str(tmp_path / "zoo"))
    cards = zoo.read_metafile(metafile)
    assert list(cards) == [f"{NAME}_moco", f"{NAME}_moco_4"]
    assert [card.weights for card in cards.values()] == weights
    assert all(os.path.isfile(path) for path in weights)


def test_the_results_are_those_of_the_published_seed(sweep, tmp_path):
    """Of two pre-training seeds; the other one's fine-tuning has other results."""
    folder = tmp_path / "seeds"
    shutil.copytree(sweep[0], folder)
    file = state.read_sweep(str(folder))
    shutil.copytree(folder / "runs/moco_seed0_det", folder / "runs/moco_seed1_det")
    other = folder / "runs/moco_seed1_det/results.json"
    other.write_text('{"bbox": {"AP": 99.0, "AP50": 99.0, "AP75": 99.0}}')
    pre, det = file.plan.entries
    first = file.plan.runs["moco_seed0_det"]
    file.plan.runs["second"] = replace(first, folder=str(other.parent), product=str(other))
    file.plan.entries += [
        {**pre, "seed": 1},
        {**det, "run": "second", "seed": 1, "pretrain_seed": 1},
    ]
    state.write_sweep(str(folder), file)
    (card,) = zoo.read_metafile(write_zoo(str(folder), str(tmp_path / "zoo"))[0]).values()
    boxes, _ = card.results
    assert boxes["Metrics"]["box AP"] == round(sweep[1]["bbox"]["AP"], 2)
    assert boxes["Fine-tuning"]["Seeds"] == 1


def test_what_a_pre_training_started_from(sweep, tmp_path):
    def facts(init_checkpoint, **parents):
        folder = tmp_path / f"start {len(list(tmp_path.iterdir()))}"
        shutil.copytree(sweep[0], folder)
        path = folder / "runs/moco_seed0/config.yaml"
        cfg = yaml.safe_load(path.read_text())
        cfg["train"]["init_checkpoint"] = init_checkpoint
        path.write_text(yaml.safe_dump(cfg))
        file = state.read_sweep(str(folder))
        run = file.plan.runs["moco_seed0"]
        start = replace(run, id="start", name="soco_seed0")
        file.plan.runs |= {"start": start, "moco_seed0": replace(run, **parents)}
        state.write_sweep(str(folder), file)
        (card,) = zoo.read_metafile(write_zoo(str(folder), str(folder / "zoo"))[0]).values()
        return card.metadata.get("Initial Weights")

    assert facts("") is None
    assert facts("/home/me/r50.pth") == "r50.pth" and facts("zoo://x") == "zoo://x"
    assert facts("/home/me/run/") == "run"
    assert facts("/sweep/runs/soco_seed0/model_final.pth", parents=("start",)) == "soco_seed0"


def test_a_config_of_the_users_own_has_no_paper_of_another_readme(sweep, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(sweep[0], folder)
    (tmp_path / "README.md").write_text("# My project\n\nUses arXiv:2003.04297 and others.\n")
    file = state.read_sweep(str(folder))
    task = ("--config-file", str(tmp_path / "configs/moco.py"))
    file.plan.runs["moco_seed0"] = replace(file.plan.runs["moco_seed0"], tasks=(task,))
    state.write_sweep(str(folder), file)
    (card,) = zoo.read_metafile(write_zoo(str(folder), str(tmp_path / "zoo"))[0]).values()
    assert not card.paper


def test_a_baseline_that_finds_nothing_has_an_ap_of_0(sweep, tmp_path):
    folder = tmp_path / "nothing"
    shutil.copytree(sweep[0], folder)
    file = state.read_sweep(str(folder))
    mine = file.plan.runs["moco_seed0_det"]
    other = folder / "runs/random_det"
    shutil.copytree(folder / "runs/moco_seed0_det", other)
    results = {task: dict.fromkeys(values, 0.0) for task, values in sweep[1].items()}
    (other / "results.json").write_text(json.dumps(results))
    run = replace(mine, id="random", name="random_det", folder=str(other), parents=())
    file.plan.runs["random"] = replace(run, product=str(other / "results.json"))
    (entry,) = (e for e in file.plan.entries if e["kind"] == FINETUNE)
    entry = {**entry, "init": "random", "run": "random"}
    file.plan.entries.append({k: v for k, v in entry.items() if k != "pretrain_seed"})
    file.labels["random"] = "random weights"
    state.write_sweep(str(folder), file)
    (card,) = zoo.read_metafile(write_zoo(str(folder), str(tmp_path / "zoo"))[0]).values()
    assert card.results[0]["Fine-tuning"]["Baselines"] == {"random weights": {"box AP": 0.0}}


def test_a_pre_training_of_unknown_length_is_no_baseline(sweep, tmp_path):
    folder = tmp_path / "unknown"
    shutil.copytree(sweep[0], folder)
    (folder / "runs/moco_seed0/progress.json").unlink()
    (card,) = zoo.read_metafile(write_zoo(str(folder), str(tmp_path / "zoo"))[0]).values()
    assert card.results[0]["Fine-tuning"]["Baselines"] == {}


def test_while_a_sweep_runs(sweep, tmp_path):
    """Of several label counts, those with a choice of learning rates may begin last."""
    folder = tmp_path / "running"
    shutil.copytree(sweep[0], folder)
    file = state.read_sweep(str(folder))
    pre, det = file.plan.entries
    waiting = file.plan.runs[det["run"]].__dict__ | {"folder": "absent", "product": "absent/x"}
    file.plan.runs["waiting"] = Run(**waiting)
    few = {**det, "label_fraction": 0.1}
    task = ("--config-file", str(ROOT / "moco.py"))  # beside tools
    file.plan.runs["moco_seed0"] = Run(**file.plan.runs["moco_seed0"].__dict__ | {"tasks": (task,)})
    file.plan.runs["seed1"] = Run(**waiting | {"kind": PRETRAIN})
    second = {**pre, "run": "seed1", "seed": 1}
    file.plan.entries = [pre, second, {**det, "run": "waiting"}, few]
    state.write_sweep(str(folder), file)
    (card,) = zoo.read_metafile(write_zoo(str(folder), str(tmp_path / "zoo"))[0]).values()
    assert (card.config, card.metadata["Seed"]) == ("moco.py", 0)
    assert card.metadata["Minutes"] >= 0
    assert [result["Fine-tuning"]["Seeds"] for result in card.results] == [1, 1]


def test_the_sweep_is_given_by_its_folder_or_config(sweep, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(f"""sweep = dict(
        output_dir={str(sweep[0])!r}, seeds=[0],
        pretrain=dict(moco=dict(config={RECIPE!r})),
        finetune=dict(det=dict(config={DETECTOR!r})),
    )""")
    main(["zoo", str(tmp_path / "mine.py"), "--out", str(tmp_path / "zoo")], "rp sweep")
    assert zoo.read_metafile(str(tmp_path / "zoo/metafile.yml"))
    for command in ("status", "zoo", "probes"):  # a file that is no config
        with pytest.raises(SystemExit):
            main([command, str(sweep[0] / "sweep.json")], "rp sweep")
        assert "sweep.json contains no sweep" in capsys.readouterr().err


def test_the_weights_load_into_a_stock_detector(sweep, published):
    detector = instantiate(rp.get_config("detection/mask_rcnn_r18_fpn_shapes.py").model)
    DetectionCheckpointer(detector).load(f"zoo://{NAME}")
    loaded = detector.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in trunk_of(sweep).items())


def test_the_weights_are_fine_tuned_and_pretrained_further(sweep, published, region_folder):
    val = rp.get_config("detection/mask_rcnn_r18_fpn_shapes.py").dataloader.test.dataset.names
    val.update(size=2, side=64)
    run = rp.finetune(
        f"zoo://{NAME}", train=val, val=val, steps=1, batch_size=2, lr=0.0, output_dir="det",
        overrides=CPU,
    )  # fmt: skip
    loaded = run.model.state_dict()
    weights = {k: v for k, v in trunk_of(sweep).items() if k.endswith(".weight")}
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert f"weights from zoo://{NAME}" in Path("det/log.txt").read_text()
    more = rp.pretrain_config(
        ROOT / RECIPE, images=region_folder.images, init=f"zoo://{NAME}", overrides=CPU
    )
    assert more.train.init_checkpoint == f"zoo://{NAME}"


def test_the_weights_are_exported(sweep, published):
    out, lines = write_export(f"zoo://{NAME}", "timm", "timm.pth")
    stem = torch.load(out, weights_only=True)["conv1.weight"]
    assert torch.equal(stem, trunk_of(sweep)["backbone.bottom_up.stem.conv1.weight"])


def test_a_changed_or_missing_file_is_refused(published):
    card = rp.read_card(f"zoo://{NAME}")
    with PathManager.open(f"zoo://{NAME}", "rb") as file:
        assert file.read(2) == b"PK"
    content = bytearray(Path(card.weights).read_bytes())
    content[len(content) // 2] ^= 1
    Path(card.weights).write_bytes(content)
    with pytest.raises(UserError, match=f"is not the file of zoo://{NAME}: its sha256 is"):
        PathManager.get_local_path(f"zoo://{NAME}")
    os.remove(card.weights)
    with pytest.raises(UserError, match=f"weights of zoo://{NAME} cannot be read: .*FileNotFound"):
        card.file()
    with pytest.raises(UserError, match="zoo://x is read-only"):
        PathManager.open("zoo://x", "wb")


def test_cards_are_looked_up_in_several_metafiles(published, tmp_path, monkeypatch):
    others = tmp_path / "elsewhere"
    shutil.move(published, others)
    with pytest.raises(UserError, match="no zoo://x, as there are no cards of weights: run"):
        zoo.read_card("x")
    monkeypatch.setenv("REGION_PRETRAIN_ZOO", f"{others}/metafile.yml")
    assert zoo.read_card(NAME).file().startswith(str(others))
    with pytest.raises(UserError, match=f"no zoo://moco-v2_r18 in .*; similar are {NAME}"):
        zoo.read_card("zoo://moco-v2_r18")
    with pytest.raises(UserError, match="there is no absent.yml"):
        zoo.read_card(NAME, "absent.yml")


def test_cards_of_another_sweep_in_the_folder_are_kept(sweep, published, tmp_path):
    file = published / "metafile.yml"
    content = yaml.safe_load(file.read_text())
    content["Models"][0]["Name"], content["Collections"][0]["Name"] = "mine", "Mine"
    content["Models"][0]["In Collection"] = "Mine"
    file.write_text(yaml.safe_dump(content))
    write_zoo(str(sweep[0]), str(published))
    write_zoo(str(sweep[0]), str(published))  # and those of its own are replaced
    cards = zoo.read_metafile(str(file))
    assert list(cards) == ["mine", NAME]
    assert [card.collection for card in cards.values()] == ["Mine", "MoCo v2"]
    assert len(yaml.safe_load(file.read_text())["Collections"]) == 2
    for text, message in (
        ("a: 1", "metafile.yml is not a metafile.yml"),
        ("Models: [{Weights: b.pth}]", r"the model \? has no Name"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            write_zoo(str(sweep[0]), str(published))
        assert file.read_text() == text


def test_a_sweep_without_finished_pretrainings_is_refused(sweep, tmp_path):
    shutil.copytree(sweep[0], tmp_path / "s")
    text = (tmp_path / "s/sweep.json").read_text().replace("model_final.pth", "other.pth")
    (tmp_path / "s/sweep.json").write_text(text)
    with pytest.raises(UserError, match="no pre-training is finished yet"):
        write_zoo(str(tmp_path / "s"), str(tmp_path / "out"))
    assert not os.path.exists(tmp_path / "out")
