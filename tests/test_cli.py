"""If these fail, a mistake ends in a traceback, in half a directory, or in a finished result that is gone.

Everything goes through real processes, as a user types it, from the repository's root.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from analysis.__main__ import main as analysis_main
from experiments.__main__ import main as experiments_main
from experiments.rundir import RunDir
from experiments.shards import Shards
from experiments.study import parse_study, repeats

ROOT = Path(__file__).parent.parent

BUDGET = """
about: a study that trains in an instant
backbone:
  {vocab_size: 300, d_model: 16, n_layers: 2, n_dense_layers: 1, d_ff: 32,
  gqa: {n_heads: 2, n_kv_heads: 1, head_dim: 8}, moe: {n_routed_experts: 8, top_k: 2, d_expert: 8, d_shared: 16}}
engram: {layer_ids: [1], tables: {d_mem: 8, n_hash_heads: 1}}
train: {tokens: 512, batch_tokens: 128, seq_len: 32, eval_tokens: 128, precision: fp32, optim: {lr: 1.0e-2}}
data: {corpus: "CORPUS", vocab_size: 300}
rhos: [0.5]
control_rho: 0.5
controls: []
seeds: [0]
runtime: {device: cpu, workers: 1}
"""


@dataclass(frozen=True)
class Place:
    """A directory with one budget, its text, its shards and its finished run."""

    path: Path
    budget: Path

    def words(self, *more: str) -> list[str]:
        here = [f"runtime.runs_dir={self.path / 'runs'}", f"runtime.data_dir={self.path / 'data'}"]
        return [str(self.budget), *here, *more]

    @property
    def shards(self) -> Path:
        return next((self.path / "data").glob("text-*"))

    @property
    def run_dir(self) -> Path:
        return next((self.path / "runs").glob("r*"))

    def files(self, *ignored: str) -> dict[str, bytes]:
        """Every file here and what it holds."""
        found = (path for path in self.path.rglob("*") if path.name not in ignored)
        return {str(path.relative_to(self.path)): path.read_bytes() if path.is_file() else b"" for path in found}


def call(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", module, *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def refusal(done: subprocess.CompletedProcess[str], code: int = 2, prefix: str = "error: ") -> str:
    """The one line that a refused command may say."""
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(prefix)
    return lines[0]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Made by `launch` itself."""
    path = tmp_path_factory.mktemp("place")
    (path / "text").mkdir()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for file in sorted(p for p in stdlib.glob("*.py") if 1500 < p.stat().st_size < 12_000)[:60]:
        shutil.copy(file, path / "text" / file.name)
    budget = path / "tiny.yaml"
    budget.write_text(BUDGET.replace("CORPUS", str(path / "text")))
    place = Place(path, budget)
    done = call("experiments", "launch", *place.words())
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunDir(place.run_dir).state() == "final"
    return place


@pytest.fixture
def place(finished: Place, tmp_path: Path) -> Place:
    """The finished study with shards and runs of its own, to be damaged. The text stays where it is."""
    for name in ("data", "runs"):
        shutil.copytree(finished.path / name, tmp_path / name)
    return Place(tmp_path, finished.budget)


def unfinish(run_dir: Path) -> None:
    (run_dir / "final.json").unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# What a launch says before it begins


def test_a_dry_run_says_what_is_there_and_a_launch_how_often_its_text_is_read(place: Place, tmp_path: Path) -> None:
    done = call("experiments", "launch", *place.words(), "--dry-run")
    assert "1 of 1 done before, 0 to train" in done.stdout
    elsewhere = Place(tmp_path / "elsewhere", place.budget)
    assert "would build the shards" in call("experiments", "launch", *elsewhere.words(), "--dry-run").stdout
    assert not elsewhere.path.exists()
    study, text = parse_study(place.words()), Shards(place.shards).manifest["splits"]["train"]["tokens"]
    often = f"note: runs of up to {10 * text:,} tokens read a text of {text:,} tokens 10.0 times"
    for times, said in ((4, None), (10, often)):
        budget = replace(study.budget, train=replace(study.budget.train, tokens=times * text))
        assert repeats(replace(study, budget=budget), place.shards) == said


# What is asked for wrongly


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["plan", "cpu-smal"],
            "'cpu-smal' is no suite (allocation, sparsity, horizon",
        ),
        (["plan", "alocation", "cpu-smoke"], "or a YAML file's path): did you mean allocation?"),
        (
            ["plan", "allocation", "cpu-smoke", "cpu-small"],
            "name one suite and one budget, not allocation cpu-smoke cpu-small",
        ),
        (["launch", "cpu-smoke", "--json"], "--json belongs to --dry-run"),
        (["plan", "nowhere.yaml"], "no budget 'nowhere.yaml'"),
        (["plan", "train.token=5"], "train.token=5: Key 'token' not in 'TrainConfig'"),
        (["plan", "suite=nothing"], "no suite 'nothing': choose one of allocation, sparsity"),
        (["plan", "engram.tables.d_mem=4096"], "is the largest below 1 that this memory allows"),
        (["launch", "train.tokens=1e6"], "train.tokens=1e6: Value '1000000.0' of type 'float'"),
        (["launch", "runtime.workers=-1"], "runtime.workers=-1 must be at least 0"),
        (["launch", "backbone.vocab_size=100"], "tokens do not fit into backbone.vocab_size=100"),
        (["data", "rhos=[1.0,"], "rhos=[1.0,: "),
        (["status", "seeds=[0]", "seeds=[1]"], "seeds is given more than once"),
    ],
)
def test_a_mistyped_study_is_refused_in_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    places = [f"runtime.{name}={tmp_path / name}" for name in ("runs_dir", "data_dir")]
    assert said in refusal(call("experiments", *words, *places))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("launch", ["data.corpus=/nowhere/text"], "no corpus '/nowhere/text'"),
        ("data", ["data.corpus=/nowhere/text"], "no corpus '/nowhere/text'"),
        ("data", ["data.tokenizer=/nowhere/tokenizer.json"], "no tokenizer '/nowhere/tokenizer.json'"),
        ("launch", ["train.eval_tokens=100000000"], "validation tokens, 100,000,000 are asked for"),
        ("launch", ["runtime.micro_batch_tokens=33"], "runtime.micro_batch_tokens=33 must be a multiple of seq_len=32"),
        ("launch", ["runtime.processes=3"], "3 processes cannot share 4 sequences a step: take a divisor of 4"),
        ("status", ["data.vocab_size=299"], "no data yet for tiny: python -m experiments data"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_nothing_is_begun(
    command: str, words: list[str], said: str, place: Place
) -> None:
    before = place.files()
    done = call("experiments", command, *place.words(*words))
    assert said in refusal(done)
    assert place.files() == before


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused_before_a_run_is_made(place: Place) -> None:
    runs = sorted(path.name for path in (place.path / "runs").iterdir())
    own = place.shards / "tokenizer.json"
    done = call("experiments", "launch", *place.words(f"data.tokenizer={own}", "backbone.vocab_size=299"))
    assert "has 300 tokens, the model only 299: set backbone.vocab_size=300" in done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (place.path / "runs").iterdir()) == runs


def test_a_workers_impossible_setting_is_refused_before_the_run_is_touched(place: Place) -> None:
    before = place.files()
    done = call("experiments", "run", str(place.run_dir), "--shards", str(place.shards), "threads=0")
    assert "threads=0 must be at least 1" in refusal(done)
    assert place.files() == before


# What lies there damaged


def edit_config(place: Place) -> None:
    path = place.run_dir / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.01", "lr: 0.02"))


@pytest.mark.parametrize(
    ("command", "harm", "said"),
    [
        ("launch", lambda place: cut(place.run_dir / "final.json"), "final.json is damaged"),
        ("launch", lambda place: cut(place.run_dir / "config.yaml"), "config.yaml: "),
        ("launch", lambda place: cut(place.shards / "train.bin"), "train.bin has"),
        ("status", lambda place: cut(place.shards / "manifest.json"), "manifest.json is damaged"),
    ],
    ids=["launch, final.json", "launch, config.yaml", "launch, train.bin", "status, manifest.json"],
)
def test_damage_is_named_with_a_remedy_and_left_as_it_is(
    command: str, harm: Callable[[Place], None], said: str, place: Place
) -> None:
    harm(place)
    before = place.files()
    line = refusal(call("experiments", command, *place.words()))
    assert said in line
    assert "delete" in line or "move its directory away" in line
    assert place.files() == before


def test_a_run_directory_that_was_edited_is_refused_by_launch_and_by_run(place: Place) -> None:
    edit_config(place)
    before = place.files()
    assert "holds another run than its name says" in refusal(call("experiments", "launch", *place.words()))
    line = refusal(call("experiments", "run", str(place.run_dir), "--shards", str(place.shards)))
    assert "it was edited or moved" in line
    assert place.files() == before


def test_a_finished_run_is_never_trained_again(place: Place) -> None:
    before = place.files("LOCK")
    assert call("experiments", "run", str(place.run_dir), "--shards", str(place.shards)).returncode == 0
    done = call("experiments", "launch", *place.words())
    assert done.returncode == 0
    assert "all done before" in done.stdout
    assert place.files("LOCK") == before


def cut_checkpoint(place: Place) -> None:
    unfinish(place.run_dir)
    kept = [path for path in place.run_dir.rglob("*") if path.is_file() and "checkpoint" in str(path)]
    cut(max(kept, key=lambda path: path.stat().st_size))


def cut_shards(place: Place) -> None:
    unfinish(place.run_dir)
    cut(place.shards / "train.bin")


def other_shards(place: Place) -> None:
    """As many tokens of other text."""
    unfinish(place.run_dir)
    path = place.shards / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))


def large_tokenizer(place: Place) -> None:
    """A run whose model has fewer tokens than the shards' tokenizer, which a tokenizer by path can bring about."""
    run = RunDir(place.run_dir).load()
    shutil.rmtree(place.run_dir)
    RunDir.create(
        place.path / "runs", replace(run, spec=replace(run.spec, model=replace(run.spec.model, vocab_size=299)))
    )


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_checkpoint, r"checkpoint.* is damaged .*delete"),
        (cut_shards, r"train\.bin has [\d,]+ bytes instead of .*delete"),
        (other_shards, r"was planned for shards \w+, but .* holds \w+: launch again"),
        (large_tokenizer, r"has 300 tokens, the model only 299: set backbone\.vocab_size=300"),
    ],
)
def test_a_worker_refuses_what_does_not_fit_its_run(harm: Callable[[Place], None], said: str, place: Place) -> None:
    """It notes the attempt, and writes nothing else."""
    harm(place)
    before = place.files("LOCK", "attempts.jsonl")
    done = call("experiments", "run", str(place.run_dir), "--shards", str(place.shards), "device=cpu")
    assert re.search(said, refusal(done))
    assert place.files("LOCK", "attempts.jsonl") == before


# Analysis


def test_analysis_refuses_what_is_not_there(tmp_path: Path) -> None:
    line = refusal(
        call("analysis", "collect", "--runs", str(tmp_path), "--table", str(tmp_path / "runs.csv")), 2, "analysis: "
    )
    assert "no finished runs in" in line
    line = refusal(
        call("analysis", "figures", "--table", str(tmp_path / "runs.csv"), "--out", str(tmp_path)), 2, "analysis: "
    )
    assert "no table" in line
    assert not list(tmp_path.iterdir())


def test_analysis_names_a_torn_result_and_keeps_the_table(place: Place) -> None:
    words = ["--runs", str(place.path / "runs"), "--table", str(place.path / "runs.csv")]
    assert call("analysis", "collect", *words).returncode == 0
    wrong = ["--table", words[3], "--out", str(place.path / "figures"), "--budget", "cpu-smoke"]
    assert "cpu-smoke" in refusal(call("analysis", "tables", *wrong), 2, "analysis: ")
    cut(place.run_dir / "final.json")
    before = place.files()
    assert "final.json is torn" in refusal(call("analysis", "collect", *words), 1, "analysis: ")
    assert place.files() == before


# Help and words


@pytest.mark.parametrize("module", ["experiments", "analysis"])
def test_every_command_explains_itself_by_an_example(module: str) -> None:
    top = call(module, "--help")
    commands = re.search(r"\{([a-z,]+)\}", top.stdout)
    assert top.returncode == 0
    assert commands is not None
    for command in commands.group(1).split(","):
        done = call(module, command, "--help")
        assert done.returncode == 0
        assert re.search(rf"examples?:\n(.*\n)*  python -m {module} {command}\b", done.stdout), command
        assert f"python -m {module}" in top.stdout


def test_words_may_stand_before_between_and_behind_options() -> None:
    words, option = ["allocation", "cpu-smoke", "rhos=[1.0,0.5]"], "--json"
    outputs = [call("experiments", "plan", *words[:i], option, *words[i:]) for i in (0, 1, 3)]
    assert [done.returncode for done in outputs] == [0, 0, 0]
    assert len({done.stdout for done in outputs}) == 1
    points = json.loads(outputs[0].stdout)
    assert [point["n_routed_experts"] for point in points] == [46, 25, 0, 46]


@pytest.mark.parametrize("words", [["plan", "--jsn"], ["launch", "--x=1"], ["lunch"]])
def test_an_unknown_option_or_command_is_refused_by_the_parser(words: list[str]) -> None:
    done = call("experiments", *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("usage: python -m experiments")


def test_a_place_that_cannot_be_written_is_named_with_what_chooses_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a read-only disk says it; root, who runs these tests in many places, may write anywhere else."""

    def barred(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/ro/.lock")

    monkeypatch.setattr("experiments.commands.parse_study", barred)
    monkeypatch.setattr("analysis.__main__._claims", barred)
    for main, word, remedy in ((experiments_main, "data", "runtime.data_dir"), (analysis_main, "claims", "--out")):
        assert main([word]) == 2
        line = capsys.readouterr().err
        assert "Read-only file system: '/ro/.lock'; " in line
        assert remedy in line
