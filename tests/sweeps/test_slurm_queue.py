"""Starting, cancelling and following a sweep on SLURM, according to what its queue contains."""

import dataclasses
import re

import pytest
from sweep_plans import DETECTOR, entries, sweep

from region_pretrain.config import load_config
from region_pretrain.errors import UserError
from region_pretrain.jobs import slurm
from region_pretrain.jobs.attempts import end_attempt, start_attempt
from region_pretrain.jobs.cluster import Cluster, load_cluster, parse_slurm
from region_pretrain.shipped import ROOT
from region_pretrain.sweeps import jobs, state, status, submission
from region_pretrain.sweeps.graph import CHOICE, FINETUNE, PRETRAIN, REGIONS, TRIAL
from region_pretrain.sweeps.plan import make_plan
from region_pretrain.sweeps.report import write_sweep_report
from region_pretrain.system import user_name


def test_jobs_of_an_earlier_start_are_not_run_again_elsewhere(start, queue, sweeps):
    start(user="alice")
    assert queue.submitted == ["pre", "det"]
    queue.users = {"": {}, "alice": queue.users[""]}
    message = "cluster=slurm, user=alice, are queued or running: det, pre; start it in the same way"
    with pytest.raises(UserError, match=message):
        start()
    with pytest.raises(UserError, match=message):
        start(kind="local", user="alice")
    queue.silent = 1
    with pytest.raises(UserError, match="whether its jobs still run is unknown here: squeue faile"):
        start(kind="local")
    assert status.status_text(str(sweeps.folder))[1]  # alice's are seen by all
    assert queue.submitted == ["pre", "det"]
    users, queue.users["alice"] = dict(queue.users["alice"]), {}  # they have ended
    for name in ("pre", "det"):
        (sweeps.folder / f"runs/{name}/product").touch()
    queue.silent = 1
    start(kind="local", user="alice")  # a finished sweep needs no queue
    assert queue.silent == 1 and users
    queue.silent = 0
    for name in ("pre", "det"):
        (sweeps.folder / f"runs/{name}/product").unlink()
    start()
    assert queue.submitted == ["pre", "det", "pre", "det"]
    assert state.read_sweep(str(sweeps.folder)).user == user_name()


def test_a_start_waits_for_the_jobs_that_were_cancelled(start, queue, sweeps, monkeypatch):
    start()
    assert submission.cancel(str(sweeps.folder)) == ["pre", "det"]
    assert queue.cancelled == ["1", "2"]
    queue.users[""] = {"1": "COMPLETING"}
    monkeypatch.setattr(jobs, "ENDING_SECONDS", 0.05)
    with pytest.raises(UserError, match="cancelled jobs of .* have not ended: 1; start it again"):
        start()
    looks = [{"1": "COMPLETING"}] * 4

    def jobs_of(user=""):
        if looks:
            return looks.pop()
        return queue.users[""] if len(queue.submitted) > 2 else {}

    monkeypatch.setattr(jobs, "ENDING_SECONDS", 60)
    monkeypatch.setattr(slurm, "jobs_of", jobs_of)
    assert start()[0] == "waiting for 1 cancelled jobs to end" and not looks
    assert queue.submitted == ["pre", "det"] * 2


def test_jobs_that_have_left_the_plan_are_named_and_cancelled(start, queue, sweeps):
    start()
    sweeps.plan.runs.pop("det")
    assert any("no longer contains them: det; to stop them" in line for line in start())
    assert submission.cancel(str(sweeps.folder)) == ["pre", "det"]
    assert sorted(queue.cancelled) == ["1", "2"]


def test_a_refused_submission_says_how_to_go_on(start, queue, sweeps):
    queue.room = 1
    with pytest.raises(UserError, match="QOSMaxSubmit.*; 1 of 2 runs have been submitted: start"):
        start()
    queue.users[""] = {}
    text, going = status.status_text(str(sweeps.folder))
    assert "pre" in text and not going  # its job is gone
    queue.users[""] = {"1": "RUNNING"}
    assert status.status_text(str(sweeps.folder))[1]
    (sweeps.folder / "runs/pre/product").touch()
    text, going = status.status_text(str(sweeps.folder))
    assert not going and text.endswith("some runs were not submitted: start the sweep again to re"
                                       "sume it")  # fmt: skip
    queue.room = 1
    start()
    assert queue.submitted == ["pre", "det"]


def test_the_status_says_why_a_job_waits(start, queue, sweeps, monkeypatch):
    start()
    queue.users[""] = {"1": "PENDING", "2": "RUNNING"}
    queue.reasons = {"1": "launch failed requeued held", "7": "Priority"}
    said = status.status_text(str(sweeps.folder))[0].splitlines()
    assert said[2].split()[:6] == ["pre", "queued", "(launch", "failed", "requeued", "held)"]
    assert said[3].split()[:2] == ["det", "running"]

    def silent(user=""):
        raise slurm.Unavailable("squeue failed: Socket timed out")

    monkeypatch.setattr(slurm, "waiting_reasons", silent)
    assert status.status_text(str(sweeps.folder))[0].splitlines()[2].split()[1:] == [
        *("queued", "1", "1")
    ]


def test_finished_runs_are_known_and_reported_without_slurm(start, queue, sweeps):
    start()
    queue.silent = 99
    with pytest.raises(slurm.Unavailable):
        status.status_text(str(sweeps.folder))
    (sweeps.folder / "runs/pre/product").touch()
    write_sweep_report(str(sweeps.folder))
    assert "2 runs: 1 finished, 1 unknown." in (sweeps.folder / "report.md").read_text()
    (sweeps.folder / "runs/det/product").touch()
    queue.silent = 1
    assert status.status_text(str(sweeps.folder))[0].endswith("\n2 finished")
    write_sweep_report(str(sweeps.folder))
    assert "2 runs: 2 finished." in (sweeps.folder / "report.md").read_text()
    assert queue.silent == 1
    queue.silent = 0


def test_following_goes_on_while_slurm_does_not_answer(start, queue, sweeps, monkeypatch):
    start()
    monkeypatch.setattr(status, "_SILENT_SECONDS", 0.01)
    queue.silent = 20

    def jobs_of(user=""):
        if queue.silent == 1:
            for name in ("pre", "det"):
                (sweeps.folder / f"runs/{name}/product").touch()
        return queue.jobs_of(user)

    monkeypatch.setattr(slurm, "jobs_of", jobs_of)
    said: list[str] = []
    status.wait(str(sweeps.folder), said.append)
    assert said[0] == "squeue failed: Socket timed out; asking again every 0.01 s"
    assert said[-1] == "\n2 finished" and queue.silent == 0


def test_the_cause_of_a_failure_is_that_of_the_process_that_failed(sweeps):
    sweeps.add("regions")
    (run,) = sweeps.plan.runs.values()
    logs = [sweeps.folder / f"{i}.log" for i in range(2)]
    for i, path in enumerate(logs):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"shard {i} ends\n")
    state.write_record(run, state.Record(1, ["1", "2"], list(map(str, logs))))
    assert state.failure(run) == ["shard 0 ends"]
    start_attempt(f"{run.folder}/shard1", "2", 0, "n1")
    end_attempt(f"{run.folder}/shard1", "failed", "rank 5 of 8 failed\nerror: the disk broke")
    assert state.failure(run) == ["error: the disk broke"]
    state.write_record(run, state.Record(2, ["3", "4"], list(map(str, logs))))
    assert state.failure(run) == ["shard 0 ends"]  # of the next submission


@pytest.mark.parametrize("outcome", ["failed", "stopped", ""])
def test_a_failed_shard_blocks_what_needs_the_store_while_the_others_run(sweeps, queue, outcome):
    """Also one that was cancelled alone, with or without recording it."""
    sweeps.add("regions")
    sweeps.add("pre", "regions")
    sweeps.add("other")
    regions, pre, _ = sweeps.plan.runs.values()
    folder = str(sweeps.folder)

    def start():
        said: list[str] = []
        file = dataclasses.replace(sweeps.file(), cluster=Cluster(), user=user_name())
        submission.start(file, folder, said.append)
        return said

    def words():
        return list(jobs.states_now(state.read_sweep(folder), folder).values())

    start()
    state.write_record(regions, state.Record(1, ["7_0", "7_1", "7_2"]))
    queue.users[""] = {"7_1": "RUNNING", "2": "RUNNING"}  # SLURM has cancelled what depends on 7_0
    start_attempt(f"{regions.folder}/shard2", "7_2", 0, "n1")
    end_attempt(f"{regions.folder}/shard2", "finished")
    start_attempt(f"{regions.folder}/shard0", "7_0", 0, "n1")
    if outcome:
        error = "error: the disk broke" if outcome == "failed" else ""
        end_attempt(f"{regions.folder}/shard0", outcome, error)
    assert words() == ["running", "blocked", "running"]
    text = status.status_text(folder)[0]
    assert re.search(r"^regions +running \(1 of 3 jobs failed\)", text, re.M)
    assert "\nregions: failed jobs: 7_0\n" in text
    assert ("\n  error: the disk broke\n" in text) == (outcome == "failed")
    submitted = list(queue.submitted)
    assert start()[0].startswith("regions: 1 of 3 jobs failed: start the sweep again when")
    assert queue.submitted == submitted
    queue.users[""] = {"2": "RUNNING"}
    assert words() == ["failed", "blocked", "running"]
    start()
    assert queue.submitted == [*submitted, "regions", "pre"]


def test_jobs_of_one_process_have_resources_of_their_own(sweeps, tmp_path):
    sweeps.add("x")
    (run,) = sweeps.plan.runs.values()
    of = {kind: dataclasses.replace(run, kind=kind) for kind in (REGIONS, CHOICE, FINETUNE)}
    path = tmp_path / "mine.py"
    path.write_text(
        "cluster = dict(kind='slurm', partition='gpu', gpus_per_node=8, mem_gb=480, time=1440,"
        " cpu=dict(partition='cpu', time='2:00:00'))"
    )
    cluster = load_cluster(str(path))
    for kind in (REGIONS, CHOICE):
        one = jobs.cluster_for(of[kind], cluster)
        assert (one.partition, one.time, one.mem_gb) == ("cpu", 120, 60)
        assert (one.gpus_per_node, one.tasks, one.nodes) == (None, 1, 1)
    assert jobs.cluster_for(of[FINETUNE], cluster) is cluster
    for cpu, message in (
        ("dict(partitoin='x')", "cpu: no setting 'partitoin'"),
        ("dict(cpus_per_task=0)", "cpus_per_task=0: must be at least 1"),
        ("dict(gpus_per_node=1)", "cpu has gpus_per_node: its jobs are one process without GPU"),
        ("'cpu'", "cpu='cpu' must be a dict of settings"),
    ):
        path.write_text(f"cluster = dict(kind='slurm', cpu={cpu})")
        with pytest.raises(UserError, match=message):
            load_cluster(str(path))


def test_fine_tunings_have_resources_of_their_own(sweeps, tmp_path):
    sweeps.add("x")
    (run,) = sweeps.plan.runs.values()
    kinds = (REGIONS, PRETRAIN, TRIAL, FINETUNE)
    of = {kind: dataclasses.replace(run, kind=kind) for kind in kinds}
    text = "partition=gpu,nodes=2,gpus-per-node=8,mem=480,finetune.nodes=1,finetune.gpus-per-node=2"
    cluster = parse_slurm(f"{text},finetune.time=2:00:00,cpu.partition=cpu")
    assert jobs.cluster_for(of[PRETRAIN], cluster) is cluster
    for kind in (TRIAL, FINETUNE):
        own = jobs.cluster_for(of[kind], cluster)
        assert (own.nodes, own.tasks, own.time, own.mem_gb) == (1, 2, 120, 120)
        assert own.partition == "gpu"
    assert jobs.cluster_for(of[REGIONS], cluster).partition == "cpu"
    path = tmp_path / "mine.py"
    path.write_text("cluster = dict(gpus_per_node=8, finetune=dict(gpus_per_node=1, mem=30))")
    found = parse_slurm(f"{path},finetune.partition=small").for_finetuning()
    assert (found.tasks, found.mem_gb, found.partition) == (1, 30, "small")
    for text, message in (
        ("finetune.partitoin=x", "--slurm: finetune: no setting 'partitoin'; did you mean part"),
        ("finetune.gpus-per-node=-1", "gpus_per_node=-1: must be at least 0"),
        ("finetune.nodes=two", "nodes=two: must be an integer"),
        ("finetune.jobs=2", "cluster finetune has jobs: set it for all jobs"),
        ("finetune.setup=module", "--slurm: finetune: no setting 'setup'"),
        ("finetune.extra=a", "--slurm: finetune: no setting 'extra'"),
        ("nodes=2,gpus-per-node=8,finetune.gpus-per-node=0", "nodes=2 without tasks"),
    ):
        with pytest.raises(UserError, match=message):
            parse_slurm(text)


def test_later_edits_of_own_configs_do_not_affect_the_jobs(queue, tmp_path):
    own, yacs = tmp_path / "my_det.py", tmp_path / "my_det.yaml"
    own.write_text(
        "from region_pretrain.config import get_config\n"
        f"cfg = get_config('{DETECTOR.removeprefix('configs/')}')\n"
        "model, dataloader, optimizer = cfg.model, cfg.dataloader, cfg.optimizer\n"
        "lr_multiplier, train = cfg.lr_multiplier, cfg.train\n"
        "model.roi_heads.box_head.fc_dims = [32]\n"
    )
    base = tmp_path / "base.yaml"
    base.write_text(
        "SOLVER: {BASE_LR: 0.5}\nDATASETS: {TRAIN: [coco_2017_val], TEST: [coco_2017_val]}\n"
    )
    yacs.write_text(
        "_BASE_: base.yaml\n"
        "MODEL: {META_ARCHITECTURE: GeneralizedRCNN, BACKBONE: {FREEZE_AT: 0}, "
        "RESNETS: {NORM: BN}}\n"
    )
    finetune = {
        "lazy": {"config": str(own)},
        "yacs": {"config": str(yacs), "overrides": ["MODEL.RPN.POST_NMS_TOPK_TEST=7"]},
        "shipped": {"config": DETECTOR},
    }
    changes = {"pretrain": {}, "baselines": {"random": {}}, "finetune": finetune, "seeds": [0]}
    file = submission.describe(sweep(tmp_path / "out", **changes), Cluster(), "")
    submission.start(file, str(tmp_path / "out"), lambda line: None)
    own.write_text("raise RuntimeError")
    base.unlink()
    file = state.read_sweep(str(tmp_path / "out"))
    found = {}
    for run in file.plan.runs.values():
        (job,) = jobs.tool_jobs(run, file)
        found[run.name] = job.arguments[1], load_config(job.arguments[1], job.arguments[2:])
    path, cfg = found["lazy_random_seed0_det"]
    assert path.startswith(str(tmp_path / "out/configs/my_det-"))
    assert list(cfg.model.roi_heads.box_head.fc_dims) == [32] and cfg.train.seed == 0
    path, cfg = found["yacs_random_seed0_det"]
    assert path.startswith(str(tmp_path / "out/configs/my_det-"))
    assert (cfg.optimizer.lr, cfg.model.cfg.MODEL.RPN.POST_NMS_TOPK_TEST) == (0.5, 7)
    assert found["shipped_random_seed0_det"][0] == str(ROOT / DETECTOR)


def test_batches_must_fit_the_processes_of_every_job(tmp_path):
    made = sweep(tmp_path, pretrain={}, baselines={"random": {}}, seeds=[0])
    submission.describe(made, Cluster(gpus_per_node=4), "")
    with pytest.raises(
        UserError, match=r"^random_lr0.05: .*total_batch_size=8 must be a multiple of"
    ):
        submission.describe(made, Cluster(gpus_per_node=16), "")
    submission.describe(made, Cluster(gpus_per_node=16, finetune={"gpus_per_node": 4}), "")
    with pytest.raises(UserError, match=r"^random_lr0.05: .*must be a multiple of"):
        submission.describe(made, Cluster(finetune={"gpus_per_node": 16}), "")


def test_another_number_of_processes_is_the_same_run(tmp_path):
    """A run may be told to resume with another one, without being computed again."""
    allowed = {"pretrain_overrides": ["train.allow_world_size_change=True"]}
    plans = [make_plan(sweep(tmp_path, **changes)) for changes in ({}, allowed)]
    assert set(plans[0].runs) == set(plans[1].runs)
    commands = [entries(plan, PRETRAIN)[0].tasks[0] for plan in plans]
    assert set(commands[1]) - set(commands[0]) == set(allowed["pretrain_overrides"])
