"""The graph of a sweep: dependencies, identical runs, and configs that do not build."""

import copy
import dataclasses
import json

import pytest
from detectron2.config import instantiate
from sweep_plans import DETECTOR, MOCO, SOCO, entries, overrides, sweep

from region_pretrain.config import CONFIG_ROOT, load_config
from region_pretrain.engine.command_line import argument_parser
from region_pretrain.engine.labelled_data import check_labelled_data
from region_pretrain.errors import UserError
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.json_files import build
from region_pretrain.metrics import DIVERGED
from region_pretrain.sweeps import configs, jobs, state, submission
from region_pretrain.sweeps.choice import choose, read_choice
from region_pretrain.sweeps.graph import CHOICE, FINETUNE, PRETRAIN, REGIONS, TRIAL, Plan
from region_pretrain.sweeps.plan import make_plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return make_plan(
        sweep(
            tmp_path_factory.mktemp("plan"),
            baselines={"random": {}},
            seeds=[0, 1],
            regions={"shards": 3},
        )
    )


@pytest.mark.parametrize("name", ["test", "photos, v2", "2024", 'the "best"'])
def test_trackers_group_the_runs_of_a_sweep(tmp_path, name):
    def groups(*changes):
        changes = ["train.writers=[console,json,{_target_:a.Writer},wandb]", *changes]
        both = {"pretrain_overrides": changes, "finetune_overrides": changes}
        plan = make_plan(sweep(tmp_path, name=name, **both))
        runs = [r for r in plan.runs.values() if r.kind in (PRETRAIN, TRIAL, FINETUNE)]
        assert len(runs) == 4
        texts = [[a for a in r.tasks[0] if "tracking.group=" in a] for r in runs]
        read = [load_config(DETECTOR, found).train.tracking.group for found in texts]
        return set(read), set(plan.runs)

    found, ids = groups()
    assert found == {name}
    assert groups("train.tracking.group=mine") == ({"mine"}, ids)
    assert groups("train.writers=[console,json,csv]") == ({None}, ids)


def test_what_depends_on_what(plan):
    (regions,) = entries(plan, REGIONS)
    assert len(regions.tasks) == 3 and "1/3" in regions.tasks[1]
    first, second = entries(plan, PRETRAIN)
    assert first.parents == second.parents == (regions.id,)
    assert overrides(first)["dataloader.train.dataset.regions"] == regions.product
    assert overrides(first)["train.max_iter"] == "10"  # 320 images / 32 images/iter
    trials = entries(plan, TRIAL, init="soco")
    assert [overrides(t)["optimizer.lr"] for t in trials] == ["0.05", "0.1"]
    for trial in trials:
        assert trial.parents == (first.id,)
        assert overrides(trial)["dataloader.test.dataset.names.seed"] == "1000"
        assert overrides(trial)["train.init_checkpoint"] == f"{first.folder}/model_final.pth"
    (choice,) = entries(plan, CHOICE, init="soco")
    assert choice.parents == tuple(t.id for t in trials)
    for run, weights in zip(entries(plan, FINETUNE, init="soco"), (first, second), strict=True):
        assert set(run.parents) == {choice.id, weights.id}
        assert overrides(run)["train.init_checkpoint"] == f"{weights.folder}/model_final.pth"
        assert "optimizer.lr" not in overrides(run)
        assert "dataloader.test.dataset.names.seed" not in overrides(run)
        assert run.tasks[0][-1] == f"@{choice.product}"
    for run in entries(plan, FINETUNE, init="random"):
        assert overrides(run)["train.init_checkpoint"] == ""
    order = list(plan.runs)
    assert all(order.index(p) < order.index(r.id) for r in plan.runs.values() for p in r.parents)
    # regions, 2 pre-trainings; for each of 2 initialisations: 2 trials, a choice, 2 seeds
    assert len(plan.runs) == 1 + 2 + 2 * 5
    assert len({run.folder for run in plan.runs.values()}) == len(plan.runs)


def test_written_and_read_back(plan):
    assert build(Plan, json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


def test_identical_runs_are_merged_whatever_their_names(tmp_path):
    twice = {
        "soco": {"config": SOCO},
        "again": {"config": SOCO, "overrides": ["optimizer.momentum=0.9"]},  # the config's value
        "other": {"config": SOCO, "overrides": ["optimizer.momentum=0.8"]},
    }
    found = make_plan(sweep(tmp_path, pretrain=twice))
    assert len(found.entries) == 3 * (1 + 1 + 2 + 1 + 1)
    assert len(found.runs) == 1 + 2 * (1 + 2 + 1 + 1)  # one region store for all
    assert entries(found, FINETUNE, init="soco") == entries(found, FINETUNE, init="again")
    assert entries(found, PRETRAIN, init="soco") != entries(found, PRETRAIN, init="other")
    # The ids depend neither on the folder nor on names and their order.
    renamed = {"x": twice["other"], "y": twice["soco"]}
    elsewhere = make_plan(sweep(tmp_path / "b", pretrain=renamed))
    assert set(elsewhere.runs) == set(found.runs)


def test_how_a_region_search_runs_does_not_change_its_id(tmp_path):
    def ids(*arguments):
        regions = {"shards": 3, **({"arguments": list(arguments)} if arguments else {})}
        return set(make_plan(sweep(tmp_path, regions=regions)).runs)

    usual = ids()
    for arguments in (
        ("--workers", "16"),
        ("--workers=16", "--max-unreadable", "0.03"),
        ("--part-size", "50", "--preview=3"),
    ):
        assert ids(*arguments) == usual
    assert ids("--boxes", "a.json", "--workers", "2") == ids("--workers=1", "--boxes", "a.json")
    assert not usual & ids("--boxes", "a.json")


def test_a_renamed_run_keeps_its_folder(tmp_path):
    values = {"pretrain": {"a": {"config": MOCO}}, "finetune": {}}
    (before,) = make_plan(sweep(tmp_path, **values)).runs.values()
    (tmp_path / "runs" / before.folder.split("/")[-1]).mkdir(parents=True)
    (after,) = make_plan(
        sweep(tmp_path, pretrain={"b": {"config": MOCO}}, finetune={})
    ).runs.values()
    assert (after.name, after.folder) == ("b_seed0", before.folder)


def test_label_fractions_and_a_single_learning_rate(tmp_path):
    det = {"config": DETECTOR, "learning_rates": [0.05], "label_fractions": [1.0, 0.1]}
    found = make_plan(
        sweep(tmp_path, pretrain={}, baselines={"random": {}}, finetune={"det": det}, seeds=[4])
    )
    whole, tenth = found.runs.values()
    assert overrides(whole)["optimizer.lr"] == "0.05"
    cfg = load_config(DETECTOR, [a for a in tenth.tasks[0] if "=" in a])
    dataset = cfg.dataloader.train.dataset
    assert dataset._target_ == "region_pretrain.data.few_label.random_fraction"
    assert (dataset.fraction, dataset.seed, cfg.optimizer.lr, cfg.train.seed) == (0.1, 4, 0.05, 4)


def test_label_fractions_of_a_split_file(tmp_path):
    split = f"{tmp_path}/instances_train2017.{{seed}}@{{percent}}.json"
    (tmp_path / "instances_train2017.1@10.json").write_text("[1, 2]")
    det = {"config": DETECTOR, "label_fractions": [1.0, 0.1], "label_split": split}
    found = make_plan(
        sweep(tmp_path, pretrain={}, baselines={"random": {}}, finetune={"det": det}, seeds=[1])
    )
    whole, tenth = (
        load_config(DETECTOR, [a for a in run.tasks[0] if "=" in a]).dataloader.train.dataset
        for run in found.runs.values()
    )
    assert (
        "split" not in whole
        and whole._target_ == load_config(DETECTOR).dataloader.train.dataset._target_
    )
    assert tenth._target_ == "region_pretrain.data.few_label.listed_images"
    assert (tenth.fraction, tenth.seed, tenth.split) == (0.1, 1, split)


def test_every_kth_checkpoint(tmp_path):
    det = {"config": DETECTOR, "checkpoints": 4}
    found = make_plan(sweep(tmp_path, pretrain={"moco": {"config": MOCO}}, finetune={"det": det}))
    (pretrain,) = entries(found, PRETRAIN)
    assert overrides(pretrain)["train.checkpoint_keep_every"] == "4"
    names = [overrides(r)["train.init_checkpoint"] for r in entries(found, FINETUNE)]
    # Of 10 iterations; files are named by the last finished one, from 0.
    wanted = ["model_0000003.pth", "model_0000007.pth", "model_final.pth"]
    assert names == [f"{pretrain.folder}/{name}" for name in wanted]
    assert all(r.parents == (pretrain.id,) for r in entries(found, FINETUNE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_seen": 100}, "images_seen=100 is not a multiple.*32"),
        ({"pretrain": {"x": {"config": DETECTOR}}}, "is not a pre-training config"),
        ({"finetune": {"x": {"config": SOCO}}}, "is not a detection config"),
        ({"pretrain": {"x": {"config": "projects/none.py"}}}, "no .*projects/none.py"),
        ({"pretrain_overrides": ["optimizer.larning_rate=1"]}, "optimizer.larning_rate"),
        (
            {"finetune_overrides": ["model.backbone.bottom_up.stem.norm=Nrm"]},
            "mask_rcnn_r18_fpn_shapes.py: model.backbone.bottom_up.stem.norm=Nrm: must be BN, ",
        ),
        (
            {"finetune_overrides": ["model.roi_heads.box_pooler.pooler_type=Nope"]},
            "mask_rcnn_r18_fpn_shapes.py with .*pooler_type=Nope does not build",
        ),
        ({"pretrain": {"x": {"config": SOCO, "regions": "absent.arrow"}}}, "absent.arrow"),
        (
            {"finetune": {n: {"config": DETECTOR, "checkpoints": int(n)} for n in "45"}},
            "need the same period",
        ),
    ],
)
def test_errors_are_raised_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make_plan(sweep(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_slurm_arrays_and_dependencies(plan, tmp_path):
    now = dict.fromkeys(plan.runs, state.WAITING)
    groups = submission.missing(plan, now)
    shown = [([r.name for r in runs], [a.name for a in after]) for runs, after in groups]
    assert shown == [
        (["regions_soco"], []),
        (["random_lr0.05", "random_lr0.1"], []),
        (["soco_seed0", "soco_seed1"], ["regions_soco"]),
        (["random_choice"], ["random_lr0.05", "random_lr0.1"]),
        (["random_seed0_det", "random_seed1_det"], ["random_choice"]),
        (["soco_lr0.05", "soco_lr0.1"], ["soco_seed0"]),
        (["soco_choice"], ["soco_lr0.05", "soco_lr0.1"]),
        (["soco_seed0_det"], ["soco_choice", "soco_seed0"]),
        (["soco_seed1_det"], ["soco_choice", "soco_seed1"]),
    ]
    # Nothing waits for finished runs, and queued ones are not submitted again.
    names = {run.name: run.id for run in plan.runs.values()}
    done = {"regions_soco", "soco_seed0", "random_lr0.05", "random_lr0.1"}
    now |= {names[n]: state.FINISHED for n in done} | {names["soco_seed1"]: state.QUEUED}
    shown = [
        ([r.name for r in rs], [a.name for a in af]) for rs, af in submission.missing(plan, now)
    ]
    assert (["soco_lr0.05", "soco_lr0.1"], []) in shown
    assert (["soco_seed1_det"], ["soco_choice", "soco_seed1"]) in shown
    assert not any("soco_seed1" in runs for runs, _ in shown)


def test_dry_run_shows_sbatch_files(plan, tmp_path):
    cluster = Cluster(kind="slurm", partition="gpu", gpus_per_node=8, array_parallelism=2)
    made = state.SweepFile("s", "s", "", cluster, "/code", "/", {}, None, copy.deepcopy(plan))
    text = submission.dry_run(made, str(tmp_path / "out"))
    assert "#SBATCH --array=0-1%2" in text and "#SBATCH --partition=gpu" in text
    assert "afterok:<soco_choice>:<soco_seed0>" in text
    assert text.count("#SBATCH --gpus-per-node=8") == 6  # not for regions and choices
    assert not (tmp_path / "out").exists()
    regions = next(iter(plan.runs.values()))
    one = jobs.cluster_for(regions, cluster)
    assert (one.gpus_per_node, one.tasks) == (None, 1)
    shards = jobs.tool_jobs(regions, made)
    assert len(shards) == 3 and len({job.output_dir for job in shards}) == 3
    here = dataclasses.replace(made, cluster=Cluster(kind="local", jobs=2))
    (whole,) = jobs.tool_jobs(regions, here)
    assert "--shard" not in whole.arguments and "--shard" in shards[0].arguments
    assert set(shards[0].arguments) - set(whole.arguments) == {"--shard", "0/3"}


def test_states_according_to_squeue(plan, tmp_path, monkeypatch):
    runs = list(plan.runs.values())
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '7_0 RUNNING'; echo '7_1 PENDING'; echo '9 COMPLETING'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    live = jobs.live_jobs(Cluster(kind="slurm"), "")
    assert live == {"7_0": state.RUNNING, "7_1": state.QUEUED, "9": state.RUNNING}
    moved = Plan({r.id: _moved(r, tmp_path) for r in runs}, plan.entries)
    names = {r.name: r for r in moved.runs.values()}
    ids = {"soco_seed0": "7_0", "soco_seed1": "7_1", "random_lr0.05": "5"}
    for name, job in ids.items():
        state.write_record(names[name], state.Record(1, [job]))
    found = jobs.states(moved, lambda: live)
    by_name = {r.name: found[r.id] for r in moved.runs.values()}
    assert by_name["soco_seed0"] == state.RUNNING and by_name["soco_seed1"] == state.QUEUED
    assert by_name["random_lr0.05"] == state.FAILED  # gone, and no results
    assert by_name["random_choice"] == by_name["random_seed1_det"] == state.BLOCKED
    assert by_name["random_lr0.1"] == by_name["soco_seed0_det"] == state.WAITING


def _moved(run, folder):
    base = str(folder / "runs" / run.name)
    return run.__class__(
        **{**run.__dict__, "folder": base, "product": f"{base}/{run.product.split('/')[-1]}"}
    )


def test_the_chosen_learning_rate_is_an_override_file(tmp_path):
    paths = {}
    for rate, ap in {"0.05": 3.5, "0.1": 7.25, "0.2": None}.items():
        path = tmp_path / f"{rate}.json"
        path.write_text(f'{{"bbox": {{"AP": {"null" if ap is None else ap}}}}}')
        paths[rate] = str(path)
    out = str(tmp_path / "new/chosen.txt")
    assert choose(list(paths.items()), "bbox/AP", out) == read_choice(out) == "0.1"
    parser = argument_parser("x", "y.py")
    args = parser.parse_intermixed_args(["--config-file", DETECTOR, "train.seed=3", f"@{out}"])
    cfg = load_config(args.config_file, args.opts)
    assert (cfg.optimizer.lr, cfg.train.seed) == (0.1, 3)
    assert choose([("0.3", paths["0.2"])], "bbox/AP", out) == "0.3"  # a detector finds nothing
    # The mean over the trials decides; one that found nothing counts as 0.
    trials = [("0.1", "0.1"), ("0.2", "0.05"), ("0.1", "0.2"), ("0.2", "0.05")]
    trials = [(rate, paths[source]) for rate, source in trials]  # means 3.625 and 3.5
    assert choose(trials, "bbox/AP", out) == "0.1"
    assert choose([*trials, ("0.1", paths["0.2"])], "bbox/AP", out) == "0.2"
    with pytest.raises(UserError, match="trial of optimizer.lr=1 has no"):
        choose([("1", "absent.json")], "bbox/AP", out)
    with pytest.raises(UserError, match="trials have no metric segm/AP: choose from bbox/AP$"):
        choose(trials, "segm/AP", out)
    assert choose([("0.3", paths["0.2"])], "segm/AP", out) == "0.3"  # nothing found, as above
    diverged = tmp_path / "diverged.json"
    diverged.write_text(json.dumps({DIVERGED: {}}))
    assert choose([("0.4", str(diverged)), ("0.05", paths["0.05"])], "bbox/AP", out) == "0.05"
    assert choose([("0.4", str(diverged)), ("0.2", paths["0.2"])], "bbox/AP", out) == "0.2"
    with pytest.raises(UserError, match=r"of all learning rates have diverged \(0.4, 0.8\): add a"):
        choose([("0.4", str(diverged)), ("0.8", str(diverged))], "bbox/AP", out)


def test_a_trial_that_diverges_is_a_result_and_a_fine_tuning_is_not(plan):
    for kind, wanted in ((TRIAL, "true"), (FINETUNE, None)):
        for run in entries(plan, kind):
            assert overrides(run).get("train.diverged_is_result") == wanted


def test_labelled_data_by_path(tmp_path, coco_folder, monkeypatch):
    monkeypatch.chdir(coco_folder)
    subset = "region_pretrain.data.few_label.random_fraction"

    def planned(name, folder):
        det = {
            "config": str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py"),
            "overrides": [f"dataloader.{s}.dataset.names={name}" for s in ("train", "test")],
            "label_fractions": [1.0, 0.5],
            "learning_rates": [0.05, 0.1],
            "held_out": [
                f"dataloader.test.dataset._target_={subset}",
                "+dataloader.test.dataset.fraction=0.34",
                "+dataloader.test.dataset.seed=1",
            ],
        }
        changes = {"pretrain": {}, "baselines": {"random": {}}, "finetune": {"det": det}}
        return make_plan(sweep(folder, **changes))

    found = planned("coco://ann.json?images=images", tmp_path / "a")
    absolute = planned(f"coco://{coco_folder}/ann.json?images={coco_folder}/images", tmp_path / "b")
    assert set(found.runs) == set(absolute.runs)  # the same computations
    sizes = set()
    for kind in (TRIAL, FINETUNE):
        for run in entries(found, kind):
            cfg = load_config(run.tasks[0][1], [a for a in run.tasks[0][2:] if "=" in a])
            classes = check_labelled_data(cfg, training=True)
            assert (classes.names, cfg.model.roi_heads.num_classes) == (["dog", "ant", "cat"], 3)
            data = [len(instantiate(cfg.dataloader[s].dataset)) for s in ("train", "test")]
            sizes.add((kind, *data))
    assert sizes == {(TRIAL, 6, 2), (TRIAL, 3, 2), (FINETUNE, 6, 6), (FINETUNE, 3, 6)}

    for name, message in (
        ("coco://ann.json", "coco://ann.json' has no images="),
        ("coco://ann.json?images=absent", "6 of the 6 images of .* do not exist, e.g. .*/absent"),
        ("coco://images/30.png?images=images", "30.png is not a json"),
        ("folder://images", "a folder has no boxes"),
    ):
        with pytest.raises(UserError, match=message):
            planned(name, tmp_path / "c")


def test_jobs_read_the_copies_of_shipped_configs_and_the_users_own_files(tmp_path, monkeypatch):
    def config_of_job(folder):
        changes = {"pretrain": {"moco": {"config": MOCO}}, "finetune": {}}
        found = submission.describe(sweep(folder, **changes), Cluster(), "sweep")
        found.root = str(tmp_path / "code")
        (run,) = entries(found.plan, PRETRAIN)
        (job,) = jobs.tool_jobs(run, found)
        return job.arguments[job.arguments.index("--config-file") + 1]

    copy = tmp_path / "code" / MOCO
    copy.parent.mkdir(parents=True)
    copy.write_text("")
    (tmp_path / "elsewhere").mkdir()
    assert config_of_job(tmp_path / "a") == str(copy)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config_of_job(tmp_path / "b") == str(copy)
    own = tmp_path / "elsewhere" / MOCO
    own.parent.mkdir(parents=True)
    names = "model, dataloader, optimizer, lr_multiplier, train"
    own.write_text(
        "from region_pretrain.config import get_config\n"
        f"_cfg = get_config({MOCO!r})\n"
        f"{names} = (_cfg[name] for name in {names.split(', ')})\n"
    )
    configs._file.cache_clear()  # a process does not change its folder
    configs.checked_config.cache_clear()
    assert config_of_job(tmp_path / "c") == str(own)
