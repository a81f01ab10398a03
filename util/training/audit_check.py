"""Is what a run's audit.json says true? Measured anew, from the models that it names."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import build_unseen
from data.image_set import ImageSet
from util.audit.audit import audit
from util.audit.statistics import POWER
from util.runtime.files import read_json, readable, sha256
from util.runtime.hardware import Hardware
from util.storage.checkpoint import load_checkpoint
from util.storage.folders import RunFolder

Check = tuple[str, bool | None, str]  # what, whether it is so (None: cannot be told), details
TOLERANCE = 0.01  # points: the rounding of audit.json, and some


def check_audits(record: Path, folder: RunFolder, data: tuple[ImageSet, ImageSet], hardware: Hardware) -> Iterator[Check]:
    """Every request of the run's audit that was audited after the task of `record`, a record of deletion."""
    file = folder.path / "audit" / "audit.json"
    if not file.exists():
        yield "audit", None, f"no file {file}; run_audit.sh makes it"
        return
    content, digest = read_json(file), sha256(record)
    with readable(file, "damaged audit"):
        requests = [request for request in content["requests"] if request.get("record_sha256") == digest]
        if not requests:
            yield "audit", None, f"{file} is of other records"
        for request in requests:
            yield f"audit of request {request['task']}", *_measured_anew(request, content, folder, data, hardware)


def _measured_anew(
    request: dict, content: dict, folder: RunFolder, data: tuple[ImageSet, ImageSet], hardware: Hardware
) -> tuple[bool | None, str]:
    entries = {e["sha256"]: Path(e["file"]) for e in content["references"] + content["originals"]}
    for digest in (*request["references"], *(e["sha256"] for e in content["originals"])):
        if not entries[digest].exists() or sha256(entries[digest]) != digest:
            return None, f"{entries[digest]} is gone, or another model"
    arguments, classes = content["arguments"], data[0].classes
    own = argparse.Namespace(**arguments | {key: arguments[key] and Path(arguments[key]) for key in ("unseen", "cache_dir")})
    before, *originals = (load_checkpoint(Path(e["file"]), arguments["head"]).model for e in content["originals"])
    after = load_checkpoint(folder.checkpoint(request["after_task"]))
    gone = {c for task in after.forgotten for c in task}
    found = audit(
        before,
        after.model,
        [load_checkpoint(entries[digest], arguments["head"]).model for digest in request["references"]],
        data,
        [classes.index(name) for name in request["forget"]],
        build_unseen(own, data[0].image_size, hardware.device),
        hardware=hardware,
        originals=originals,
        remain=[c for c in range(len(classes)) if c not in gone],
        figures=arguments["figures"],
        seed=arguments["seed"],
    ).figures
    recorded = request["figures"]
    differing = [key for key in found if key not in recorded or not _alike(found[key], recorded[key])]
    powerless = [key for key, entry in found.items() if entry["power"] is not None and entry["power"] < POWER]
    told = f"not so: {', '.join(differing)}" if differing else f"all {len(found)} figures"
    return not differing, told + (f"; no power on these data: {', '.join(powerless)}" if powerless else "")


def _alike(found: dict, recorded: dict) -> bool:
    ours, theirs = (
        [e["value"] or 0.0, *e["references"], *e["originals"], float(e["value"] is None)] for e in (found, recorded)
    )
    same = len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    return same and found["verdict"] == recorded["verdict"]
