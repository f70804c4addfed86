"""YAML files and `key=value` words -> frozen dataclasses. The only file that knows OmegaConf.

Precedence: dataclass defaults, then the YAML file, then the words. Everything becomes a frozen dataclass at once, so
that unknown keys, wrong types and impossible values are refused before any work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]  # comes with OmegaConf
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.settings import Budget, Run, Runtime, UserError

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_BUDGET = "cpu-small"

T = TypeVar("T")

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*=(?!\?\?\?$)", re.ASCII)  # `???` is OmegaConf's "not given"


def budget_names() -> list[str]:
    """Budgets that come with the suite."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_budget(name: str, overrides: Sequence[str] = ()) -> Budget:
    """Read a budget by name, or by the path of a YAML file, and apply `key=value` overrides.

    Raises:
        UserError: unknown budget, unknown or repeated key, wrong type, or a value that a dataclass refuses.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no budget {name!r}: choose one of {', '.join(budget_names())}, or give a YAML file's path")
    keys = [_key(word) for word in overrides]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"{', '.join(twice)} is given more than once: {' '.join(overrides)}")
    with _blaming(f"budget {name}"):
        layers = [{"name": path.stem}, *({key: value} for key, value in _read(path).items())]
    config = OmegaConf.structured(Budget)
    for layer in layers:
        with _blaming(f"budget {name}: {next(iter(layer))}"):
            config = OmegaConf.merge(config, layer)
    config = _with_overrides(config, overrides)
    with _blaming(f"budget {name}"):
        budget = OmegaConf.to_object(config)
        assert isinstance(budget, Budget)
        _check_runtime(budget.runtime, "runtime.")
    return budget


def load_runtime(overrides: Sequence[str]) -> Runtime:
    """Read a worker's `key=value` settings; of two for one key the later counts.

    Raises:
        UserError: unknown key, wrong type or an impossible value.
    """
    config = _with_overrides(OmegaConf.structured(Runtime), overrides)
    with _blaming("runtime settings"):
        runtime = OmegaConf.to_object(config)
        assert isinstance(runtime, Runtime)
        _check_runtime(runtime)
    return runtime


def load_dataclass(schema: type[T], path: Path, overrides: Sequence[str], verbatim: Sequence[str] = ()) -> T:
    """Read any frozen dataclass from a YAML file, then apply `key=value` overrides.

    Args:
        schema: the dataclass.
        path: the file.
        overrides: of two for one key the later counts.
        verbatim: keys whose text is taken as it stands, since YAML reads an unquoted 12:00:00 as 43200.

    Raises:
        UserError: unknown key, wrong type, or a value that the dataclass refuses.
    """
    config = OmegaConf.structured(schema)
    with _blaming(str(path)):
        layers = _read(path)
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        layers |= {key.value: value.value for key, value in root.value if key.value in verbatim}
    for key, value in layers.items():
        with _blaming(f"{path}: {key}"):
            config = OmegaConf.merge(config, {key: value})
    for word in overrides:
        if (key := _key(word)) in verbatim:
            config = OmegaConf.merge(config, {key: word.partition("=")[2]})
        else:
            config = _with_overrides(config, [word])
    with _blaming(str(path)):
        loaded = OmegaConf.to_object(config)
        assert isinstance(loaded, schema)
        return loaded


def save_run(run: Run, path: Path) -> None:
    """Write a run as YAML; `load_run` gives an equal object back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(run)))


def load_run(path: Path) -> Run:
    """Read what `save_run` wrote.

    Raises:
        UserError: the file is not a run of this version.
    """
    with _blaming(str(path), "if it was damaged, move its directory away and launch again"):
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), _read(path)))
    assert isinstance(run, Run)
    return run


def _read(path: Path) -> dict[str, Any]:
    """A YAML file's mapping, interpolations as they stand."""
    try:
        given = OmegaConf.create(path.read_text(encoding="utf-8"))
    except AssertionError:  # OmegaConf's, for a file that holds a number
        given = None
    if not isinstance(given, DictConfig):
        raise ValueError("the file must map keys to values")
    return {str(key): value for key, value in OmegaConf.to_container(given, resolve=False).items()}  # type: ignore[union-attr]


def _with_overrides(config: Any, overrides: Sequence[str]) -> Any:
    """Merge words one by one, so that an error names the word."""
    for word in overrides:
        _key(word)
        with _blaming(word):
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([word]))
    return config


def _key(word: str) -> str:
    if not _OVERRIDE.match(word):
        raise UserError(f"changes look like train.tokens=100000, not {word}")
    return word.partition("=")[0]


def _check_runtime(runtime: Runtime, prefix: str = "") -> None:
    for key, least in {
        "workers": 0,
        "threads": 1,
        "processes": 1,
        "micro_batch_tokens": 0,
        "checkpoint_every_s": 0,
    }.items():
        if not getattr(runtime, key) >= least:
            raise ValueError(f"{prefix}{key}={getattr(runtime, key)} must be at least {least}")


@contextmanager
def _blaming(what: str, remedy: str = "") -> Iterator[None]:
    """Turn what OmegaConf, YAML and our own dataclasses raise into one line from `what` to `remedy`."""
    try:
        yield
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
            # Else a word or a file would be quoted, with arrows under it that one line cannot hold.
            error = ValueError(f"no YAML: {error.problem} in line {error.problem_mark.line + 1}")
        # OmegaConf adds lines about its own types, and forgets to fill in a value that is inside a list.
        noise = ("reference_type=", "object_type=", f"full_key: {what.partition('=')[0]}")
        lines = [line.strip() for line in str(error).splitlines()]
        text = " ".join(line for line in lines if line and not line.startswith(noise))
        text = text.replace("'$VALUE' of type '$VALUE_TYPE'", "in it").replace("'$VALUE'", "in it")
        raise UserError(f"{what}: {text.replace('self.', '')}{remedy and f'; {remedy}'}") from error
