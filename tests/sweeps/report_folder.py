"""The folder of a partly finished sweep, for the tests of its report."""

import json

import numpy as np

from region_pretrain.jobs.attempts import end_attempt, start_attempt
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import state
from region_pretrain.sweeps.graph import CHOICE, FINETUNE, PRETRAIN, TRIAL, Plan, Run

LABELS = {"random": "random weights", "soco": "SoCo <&>", "mcl": "MCL"}
TASKS, METRICS = ("bbox", "segm"), ("AP", "AP50", "AP75")


class Folder:
    """The folder of a sweep that is partly finished."""

    def __init__(self, root) -> None:
        self.root, self.plan, self.rng = root, Plan(), np.random.default_rng(0)
        self.values: dict[tuple, list[dict]] = {}
        for init in ("soco", "mcl"):
            for seed in (0, 1):
                self.pretrain(init, seed)
        for init in LABELS:
            for fraction in (1.0, 0.1):
                labels = {"init": init, "finetune": "det", "label_fraction": fraction}
                labels["checkpoint"] = "final"
                self.choice(labels)
                for seed in (0, 1):
                    self.finetune(labels, seed)
        (root / "jobs").mkdir()
        failed = self.plan.runs["det_mcl_0.1_1"]
        log = root / "jobs/12_0_log.out"
        log.write_text("iter 1/2\nRuntimeError: the disk <melted>\nsubmitit ERROR (x)\nTraceback\n")
        state.write_record(failed, state.Record(2, ["12"], [str(log)]))
        sweep = state.SweepFile(
            "s", "A sweep", "python tools/sweep.py --config s.py", Cluster(kind="local"),
            "/", "/", LABELS, 320, self.plan, pictures=2,
        )  # fmt: skip
        state.write_sweep(str(root), sweep)

    def run(self, name, kind, product, **labels):
        folder = self.root / "runs" / name
        run = Run(name, kind, name, "t.py", ((),), str(folder), str(folder / product))
        self.plan.runs[name] = run
        self.plan.entries.append({"kind": kind, **labels, "run": name})
        return folder

    def write(self, folder, rows):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def pretrain(self, init, seed):
        folder = self.run(f"{init}_{seed}", PRETRAIN, "model_final.pth", init=init, seed=seed)
        speed, memory = self.rng.uniform(10, 90, 5), self.rng.uniform(500, 900, 5)
        steps = zip(range(1, 10, 2), speed, memory, strict=True)
        rows = [
            {
                "iteration": i,
                "time": 32 / s,
                "img_per_sec": s,
                "peak_memory_mib": m,
                "total_loss": s,
            }
            for i, s, m in steps
        ]
        if init == "soco":
            first, last = self.rng.uniform(0, 1, 2)
            rows[-1]["probe/knn_fpn"] = last
            rows.insert(0, {"iteration": 0, "probe/knn_fpn": first, "probe/other": 0.25})
            self.values.setdefault("probes", []).append((first, last))
        self.write(folder, rows)
        (folder / "model_final.pth").touch()
        self.values.setdefault(("cost", init), []).append({"speed": speed, "memory": memory})

    def choice(self, labels):
        name = f"{labels['init']}_{labels['label_fraction']}"
        for rate, ap in ((0.05, 3.21), (0.1, 4.56)):
            folder = self.run(f"{name}_{rate}", TRIAL, "results.json", **labels, learning_rate=rate)
            self.plan.entries[-1]["metric"] = "bbox/AP"
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps({"bbox": {"AP": ap}}))
        folder = self.run(f"{name}_choice", CHOICE, "chosen.txt", **labels)
        folder.mkdir()
        (folder / "chosen.txt").write_text("optimizer.lr=0.1\n")

    def finetune(self, labels, seed):
        name = f"det_{labels['init']}_{labels['label_fraction']}_{seed}"
        if labels["init"] != "random":
            labels = {**labels, "pretrain_seed": seed}
        folder = self.run(name, FINETUNE, "results.json", **labels, seed=seed)
        if name == "det_mcl_0.1_1":
            return
        found = {t: {m: self.rng.uniform(0, 60) for m in METRICS} for t in TASKS}
        points = [{f"{t}/{m}": v * x for t in TASKS for m, v in found[t].items()} for x in (0.5, 1)]
        rows = [{"iteration": i, **p} for i, p in zip((4, 9), points, strict=True)]
        self.write(folder, rows)
        start_attempt(str(folder), "7", 0, "host")
        end_attempt(str(folder), "finished")
        (folder / "results.json").write_text(json.dumps(found))
        self.values.setdefault((labels["init"], labels["label_fraction"]), []).append(found)
