import pytest

from region_pretrain.config import CONFIG_ROOT
from region_pretrain.errors import UserError
from region_pretrain.jobs.cluster import Cluster, check_cluster, load_cluster, parse_slurm

EXAMPLE = str(CONFIG_ROOT / "clusters/example.py")


def test_settings_as_users_write_them():
    cluster = parse_slurm(
        "partition=gpu,nodes=2,gpus-per-node=8,time=1-12:30,mem=64G,exclude=n[1,3],n7,"
        "constraint=a100|h100,cpus_per_task=12,+mail-type=END,gres=disk:1"
    )
    assert cluster == Cluster(
        partition="gpu",
        nodes=2,
        gpus_per_node=8,
        time=36 * 60 + 30,
        mem_gb=64.0,
        exclude="n[1,3],n7",
        constraint="a100|h100",
        cpus_per_task=12,
        extra={"mail-type": "END"},
        gres="disk:1",
    )
    assert cluster.tasks == 8


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("2:00:00", 120), ("1-0", 1440), ("1-2:03", 1563)],
)
def test_slurms_forms_of_a_time(text, minutes):
    assert parse_slurm(f"time={text}").time == minutes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion=gpu", "--slurm: no setting 'partion'; did you mean partition"),
        ("quux=1", "known settings: partition, account"),
        ("nodes", "'nodes' is not of the form key=value"),
        ("+nice=", r"'\+nice=' is not of the form key=value"),
        ("nodes=two", "nodes=two: must be an integer"),
        ("time=soon", "time=soon: must be minutes, HH:MM:SS"),
        ("mem=much", "mem_gb=much: must be a number of GB"),
        ("nodes=0", "nodes=0: must be at least 1"),
        ("nodes=2", "nodes=2 without tasks: set the number of processes"),
        ("gres=gpu:a100:4", "gres=gpu:a100:4 without tasks"),
        ("gpus-per-node=4,tasks-per-node=2", "there is one task per GPU"),
        ("gpus-per-node=4,gres=gpu:4", "both request GPUs"),
        ("nodes=2,gpus=8", "with nodes=2 write gpus-per-node=N"),
        ("time=2", "time=2 minutes is not longer than signal_seconds=120"),
        ("clusters/nowhere.py,nodes=2", "no cluster file clusters/nowhere.py"),
    ],
)
def test_invalid_settings_are_refused(text, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse_slurm(text)


def test_a_settings_file_and_overrides(tmp_path):
    cluster = load_cluster(EXAMPLE)
    assert (cluster.partition, cluster.gpus_per_node, cluster.time) == ("gpu", 8, 1440)
    assert cluster.extra == {"comment": "region_pretrain"}
    changed = parse_slurm(f"{EXAMPLE},nodes=4,qos=high,+nice=10")
    assert (changed.nodes, changed.qos, changed.partition) == (4, "high", "gpu")
    assert changed.extra == {"comment": "region_pretrain", "nice": "10"}
    flags = parse_slurm("+exclusive,partition=gpu,+overcommit,cpus-per-task=2")
    assert flags.extra == {"exclusive": True, "overcommit": True}
    assert (flags.partition, flags.cpus_per_task) == ("gpu", 2)
    mine = tmp_path / "mine.py"
    mine.write_text("cluster = dict(nodes=2, gpus=8)")
    with pytest.raises(UserError, match="mine.py: gpus=N is .* write gpus-per-node=N"):
        load_cluster(str(mine))
    assert load_cluster(str(mine), ["gpus-per-node=4"]).gpus_per_node == 4
    mine.write_text("cluster = dict(partition='x', time='1:00:00', setup=['module load cuda'])")
    assert load_cluster(str(mine)).time == 60
    mine.write_text("cluster = dict(kind='local')")
    with pytest.raises(UserError, match="mine.py,qos=high: the file has kind=local, not slurm"):
        parse_slurm(f"{mine},qos=high")
    mine.write_text("cluster = dict(partitions='x')")
    with pytest.raises(UserError, match="mine.py: no setting 'partitions'; did you mean partition"):
        load_cluster(str(mine))
    mine.write_text("clutser = {}")
    with pytest.raises(UserError, match="has no dict named cluster"):
        load_cluster(str(mine))


def test_a_local_job_has_one_node():
    with pytest.raises(UserError, match="kind=local has only one node"):
        Cluster(kind="local", nodes=2, tasks_per_node=1)
    with pytest.raises(UserError, match="kind=pbs: must be one of local, slurm, debug"):
        Cluster(kind="pbs")
    check_cluster(Cluster(kind="local"))  # does not need SLURM


def fake_command(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_cluster_is_checked_against_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch on this machine.*--dry-run"):
        check_cluster(Cluster(partition="gpu"))
    for name in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        fake_command(tmp_path, name, "exit 1")
    with pytest.raises(UserError, match="no sinfo on this machine"):
        check_cluster(Cluster(partition="gpu"))
    fake_command(tmp_path, "sinfo", "echo gpu; echo gpu; echo cpu")
    check_cluster(Cluster(partition="cpu,gpu"))
    check_cluster(Cluster())
    with pytest.raises(UserError, match="no partition 'gpus' in this cluster; there is gpu"):
        check_cluster(Cluster(partition="gpus"))
    with pytest.raises(UserError, match="no partition 'cpus' in this cluster"):
        check_cluster(Cluster(partition="gpu", finetune={"partition": "cpus"}))
    fake_command(tmp_path, "sinfo", "echo cannot contact controller >&2; exit 1")
    with pytest.raises(UserError, match="sinfo failed: cannot contact controller"):
        check_cluster(Cluster(partition="gpu"))
