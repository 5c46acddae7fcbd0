"""What has arrived of a workdir's run: by MLflow's client, and from W&B's own file."""

import json
import pathlib
import struct
import time

import runs


class Arrived:
    """Of a workdir's run: id, settings, {(step, name): values}, the summary, and files' names."""

    def __init__(self, workdir: pathlib.Path, kind: str, ended: bool = True):
        self._ended = ended
        self.id = json.loads((workdir / "tracker.json").read_text())[kind]
        self.settings, self.rows, self.summary, self.files, self.status = {}, {}, {}, set(), None
        {"mlflow": self._mlflow, "wandb": self._wandb}[kind](workdir)

    def _mlflow(self, workdir):
        import mlflow

        client = mlflow.MlflowClient()
        run = client.get_run(self.id)
        self.settings, self.status = run.data.params, run.info.status
        assert client.get_experiment(run.info.experiment_id).name == "meadow" and run.info.run_name == workdir.name
        for name in run.data.metrics:
            for metric in client.get_metric_history(self.id, name):
                self.rows.setdefault((metric.step, name), []).append(metric.value)
        self.summary = {name: run.data.metrics[name] for name in run.data.metrics if name.startswith("final/")}
        self.rows = {key: values for key, values in self.rows.items() if not key[1].startswith("final/")}
        self.files = {pathlib.PurePath(file.path).name for file in client.list_artifacts(self.id, "figures")}

    def _wandb(self, workdir):
        files = sorted(workdir.glob(f"wandb/offline-run-*-{self.id}/run-{self.id}.wandb"))
        self.status, end = len(files), time.monotonic() + 30
        while self._ended and not all(any(r.HasField("exit") for r in wandb_records(file)) for file in files):
            assert time.monotonic() < end  # a process of W&B's writes it, which `finish` does not wait for
            time.sleep(0.05)
        for record in (record for file in files for record in wandb_records(file)):
            if record.WhichOneof("record_type") == "history":
                found = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                step = found.pop("_step")
                for name in found.keys() - {"_runtime", "_timestamp"}:
                    self.rows.setdefault((step, name), []).append(found[name])
            for item in record.summary.update:
                self.summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            for item in record.config.update:
                self.settings["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        self.files = {name.removeprefix("figures/") for name in self.summary if name.startswith("figures/")}
        self.settings.pop("_wandb", None)


def wandb_records(path: pathlib.Path):
    """Of W&B's file: LevelDB's log, blocks of 32 KiB with pieces (crc, length, kind: whole, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += 7 + length
        parts += content[position - length : position]
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def reported(workdir: pathlib.Path) -> dict[tuple[int, str], list[float]]:
    """What metrics.jsonl has, of the training itself."""
    return {
        (row["step"], name): [value]
        for row in runs.rows(workdir, times=True)
        if "split" not in row
        for name, value in row.items()
        if name != "step" and value is not None
    }


def check_arrived(workdir: pathlib.Path, kind: str) -> Arrived:
    """The rows that are once in the workdir are once there, and the final scores."""
    found, (*_, final) = Arrived(workdir, kind), runs.rows(workdir)
    assert found.rows == reported(workdir) and len(found.rows) > 10
    scores = {name: value for name, value in final.items() if name.startswith("final/") and value is not None}
    assert scores and scores.items() <= found.summary.items()
    return found
