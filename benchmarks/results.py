"""Where results go: benchmarks/results/DATE-NAME.json, with the machine and versions, and a table on the screen."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "torchvision", "webdataset", "simplejpeg", "isal", "numpy", "pillow", "pyarrow")


def machine() -> dict[str, Any]:
    """Processor, cores, Python and libraries."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_at_the_end": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def publish(name: str, figures: dict[str, Any]) -> None:
    """Write and print `figures`."""
    record = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), **figures}
    path = Path(__file__).parent / "results" / f"{record['date']}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    for title, values in figures.items():
        if isinstance(values, dict):
            print(title.replace("_", " "))
            for key, value in values.items():
                print(f"  {key:34} {value:>12,}" if isinstance(value, int | float) else f"  {key:34} {value}")
        else:
            print(f"{title.replace('_', ' ')}: {values}")
    print(path)
