"""What the machine is, and how busy it was beside a process of ours.  Linux."""

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

BUSY = 0.15  # cores used by others from which figures are marked


def read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def description():
    """Processor, memory and the switches that matter here."""
    cpu = next((line.split(":", 1)[1].strip() for line in read("/proc/cpuinfo").splitlines()
                if line.startswith(("model name", "Model"))), platform.processor() or platform.machine())
    memory = next((int(line.split()[1]) * 1024 for line in read("/proc/meminfo").splitlines()
                   if line.startswith("MemTotal:")), 0)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "transparent_hugepage": read("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
    }


def busy_seconds():
    """CPU seconds all cores have worked or were taken away by the hypervisor."""
    fields = [int(field) for field in read("/proc/stat").split("\n", 1)[0].split()[1:9]]
    if len(fields) < 8:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclass
class Load:
    """Load averages around a run, and the cores that others used during it."""

    before: float
    after: float
    others: float

    @property
    def busy(self):
        return self.others > BUSY


class Watch:
    """Started before a process; `stop(cpu_seconds)` takes what the process itself used."""

    def __init__(self):
        self.load, self.busy, self.began = os.getloadavg()[0], busy_seconds(), time.monotonic()

    def stop(self, cpu_seconds):
        wall = max(time.monotonic() - self.began, 1e-3)
        others = max(busy_seconds() - self.busy - cpu_seconds, 0) / wall
        return Load(round(self.load, 2), round(os.getloadavg()[0], 2), round(others, 2))
