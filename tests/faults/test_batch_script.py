"""No value that a user gives becomes a line of the batch script."""

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from region_pretrain.errors import UserError
from region_pretrain.jobs.cluster import Cluster, load_cluster, parse_slurm
from region_pretrain.jobs.executor import sbatch_text, submit
from region_pretrain.jobs.job import ToolJob

BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\u2029"]
TEXTS = ("partition", "account", "qos", "constraint", "gres", "exclude")


def script(cluster, folder="out/slurm", name="job", root="/code", after=()):
    job = ToolJob("tools/tool.py", [], "out", root)
    return sbatch_text([job], cluster, folder, name, after)


def options(text):
    """Option -> value of each ``#SBATCH`` line, read as sbatch does."""
    found = {}
    for line in text.split("\n"):
        if line.startswith("#SBATCH"):
            _, option = shlex.split(line, comments=False)
            key, _, value = option.removeprefix("--").partition("=")
            assert key not in found
            found[key] = value
    return found


@pytest.mark.parametrize("brk", BREAKS)
def test_line_breaks_are_refused_wherever_they_are_given(tmp_path, brk):
    bad = f"gpu{brk}touch /tmp/x"
    for key in TEXTS:
        with pytest.raises(UserError, match=f"cluster {key}=.*not allowed") as refused:
            parse_slurm(f"{key}={bad}")
        assert len(str(refused.value).splitlines()) == 1
        with pytest.raises(UserError, match="not allowed"):
            Cluster(**{key: bad})
    for text in (f"+comment={bad}", f"+{bad}=1"):
        with pytest.raises(UserError, match="sbatch option"):
            parse_slurm(text)
    path = tmp_path / "mine.py"
    path.write_text(f"cluster = dict(partition={bad!r})\n")
    with pytest.raises(UserError, match=r"mine.py: cluster partition=.*not allowed"):
        load_cluster(str(path))
    path.write_text(f"cluster = dict(extra={{{bad!r}: 1}})\n")
    with pytest.raises(UserError, match="mine.py: sbatch option"):
        load_cluster(str(path))
    for place in ("folder", "name", "root"):
        with pytest.raises(UserError, match="not allowed"):
            script(Cluster(), **{place: bad})
    with pytest.raises(UserError, match="not allowed"):
        script(Cluster(), after=[bad])


def test_nothing_is_written_for_a_folder_with_a_line_break(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = ToolJob("tools/tool.py", [], "out", "/code")
    with pytest.raises(UserError, match=r"output folder='out\\nrm x'.*not allowed"):
        submit([job], Cluster(), "out\nrm x", "name")
    assert list(tmp_path.iterdir()) == []


def test_every_line_of_the_script_is_known():
    text = script(parse_slurm("partition=gpu,nodes=2,gpus-per-node=8,+mail-type=END,time=60"))
    lines = text.split("\n")
    found = options(text)
    assert found == {
        "gpus-per-node": "8",
        "job-name": "job",
        "mail-type": "END",
        "nodes": "2",
        "ntasks-per-node": "8",
        "open-mode": "append",
        "output": found["output"],
        "partition": "gpu",
        "requeue": "",
        "signal": "USR2@120",
        "time": "60",
        "wckey": "submitit",
    }
    assert found["output"].endswith("out/slurm/%j_0_log.out")
    others = [line for line in lines if line and not line.startswith("#")]
    begins = ("export PYTHONPATH=/code", "export SUBMITIT_EXECUTOR=slurm", "srun --unbuffered")
    begins += ("code=$?", "[ $code -eq 0 ] || ", "exit $code")
    assert len(others) == len(begins)
    assert all(line.startswith(start) for line, start in zip(others, begins, strict=True))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*TEXTS, "extra", "folder", "name"]), st.text(min_size=1)))
def test_any_text_is_refused_or_stays_a_value(values):
    harmless = {key: "x" for key in values}
    scripts = []
    for given_values in (harmless, values):
        fields = {key: v for key, v in given_values.items() if key in TEXTS}
        if "extra" in given_values:
            fields["extra"] = {"comment": given_values["extra"]}
        places = {key: v for key, v in given_values.items() if key in ("folder", "name")}
        try:
            scripts.append(script(Cluster(tasks_per_node=1, **fields), **places))
        except UserError:
            return
    plain, text = scripts
    assert len(text.split("\n")) == len(plain.split("\n"))
    found = options(text)
    assert found.keys() == options(plain).keys()
    for key in values.keys() & set(TEXTS):
        assert found[key] == values[key]
    assert found.get("comment", "") == values.get("extra", "")
    assert found["job-name"] == values.get("name", "job")
