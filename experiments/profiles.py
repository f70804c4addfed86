"""What a run asks of a SLURM cluster: one YAML file per kind of job, in `slurm/`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from experiments.loading import load_dataclass
from experiments.settings import Runtime, UserError

PROFILES = Path(__file__).parent.parent / "slurm"

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d)(?::([0-5]\d))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Resources of one job array element, that is of one run. None leaves it to the cluster's own default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str
    """Minutes, HH:MM:SS, or D-HH:MM:SS. A run that needs longer is requeued and goes on."""
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    """Processes of one run on a node; with GPUs, one each."""
    cpus_per_task: int = 1
    mem_gb: float = 4.0
    """Of a node."""
    constraint: str | None = None
    array_parallelism: int = 16
    """Runs trained at the same time, at most."""
    max_requeues: int = 50
    """Times a run may reach its time limit; preemptions do not count, unless `time` is 10 minutes or less."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which a run is told to save."""
    lock_wait_s: int = 600
    """How long a run that starts again waits for a process of its former start that still lives."""
    ask_above_hours: float = 24.0
    """`launch` asks before it submits more device hours than this."""
    setup: tuple[str, ...] = ()
    """Shell lines run on the node first, such as `module load cuda`."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further parameters of sbatch: `{reservation: dev, exclusive: true}`."""

    def __post_init__(self) -> None:
        for key in ("nodes", "tasks_per_node", "cpus_per_task", "array_parallelism", "signal_delay_s", "minutes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("gpus_per_node", "max_requeues", "lock_wait_s", "ask_above_hours"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 0")
        if not self.mem_gb > 0:
            raise ValueError(f"{self.mem_gb=} must be positive")
        if self.gpus_per_node and self.tasks_per_node > self.gpus_per_node:
            raise ValueError(f"{self.tasks_per_node=} processes need a GPU each, and {self.gpus_per_node=}")
        if self.signal_delay_s * 2 > self.minutes * 60:
            raise ValueError(f"{self.signal_delay_s=} must leave at least half of time={self.time} for work")
        if taken := sorted({"array", "job-name", "job_name", "signal", "requeue"} & set(self.extra)):
            raise ValueError(f"extra.{taken[0]} is set by the suite itself: remove it")

    @property
    def minutes(self) -> int:
        """The time limit; SLURM counts in minutes and so does submitit."""
        if self.time.isascii() and self.time.isdigit():
            return int(self.time)
        if (clock := _CLOCK.fullmatch(self.time)) is None:
            raise ValueError(f"time={self.time} must be minutes, HH:MM:SS or D-HH:MM:SS")
        days, first, second, third = (int(part or 0) for part in clock.groups())
        if days or clock.group(4):
            return days * 1440 + first * 60 + second + (third > 0)
        raise ValueError(f"time={self.time} may mean minutes or hours: write HH:MM:SS")

    @property
    def n_tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def device(self) -> str:
        return "GPU" if self.gpus_per_node else "CPU"


def load_profile(name: str, overrides: Sequence[str] = ()) -> Profile:
    """Read a profile by its name in `slurm/` or by its path.

    Args:
        name: `cpu`, `slurm/cpu.yaml`, or a file of one's own.
        overrides: `key=value`.

    Raises:
        UserError: no such profile, unknown key, wrong type or an impossible value.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no profile {name!r}: choose one of {', '.join(profile_names())}, or give a YAML file's path")
    return load_dataclass(Profile, path, overrides, verbatim=("time",))


def profile_names() -> list[str]:
    """Profiles that come with the suite."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def fit_runtime(profile: Profile, runtime: Runtime) -> Runtime:
    """What a worker inside the job is told: the profile decides on the device.

    Raises:
        UserError: the two contradict each other, so that devices would idle or cores be shared.
    """
    if profile.n_tasks > 1 and runtime.processes > 1:
        raise UserError(
            f"runtime.processes={runtime.processes} and {profile.n_tasks} tasks of the profile both start processes: "
            "leave runtime.processes at 1"
        )
    on_node = profile.tasks_per_node if profile.n_tasks > 1 else runtime.processes
    if profile.gpus_per_node and profile.gpus_per_node != on_node:
        raise UserError(
            f"gpus_per_node={profile.gpus_per_node}, but a run has {on_node} processes on a node: "
            "set tasks_per_node to the number of GPUs"
        )
    cores = runtime.threads * (runtime.processes if profile.n_tasks == 1 else 1)
    if cores > profile.cpus_per_task:
        raise UserError(f"a run wants {cores} threads of a task, but cpus_per_task={profile.cpus_per_task}: raise it")
    wanted: Literal["cpu", "cuda"] = "cuda" if profile.gpus_per_node else "cpu"
    if runtime.device not in ("auto", wanted):
        raise UserError(
            f"runtime.device={runtime.device}, but the profile has gpus_per_node={profile.gpus_per_node}: "
            "choose another profile"
        )
    # Named, since "auto" would train on the CPU of a node whose GPU is broken.
    return replace(runtime, device=wanted)
