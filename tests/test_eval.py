"""If these fail, a score is not that of the run's model on those items, is made twice, or a missing one goes unsaid."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import build_shards, study_run

from experiments import harness
from experiments.benchmarks import GROUPS, PAPER, TEXT, Benchmark, choose
from experiments.domains import bits_per_byte, find_domains, ratio
from experiments.evals import Asked, evaluate, in_words
from experiments.finished import Finished, open_finished
from experiments.local_tasks import local_tasks
from experiments.rundir import RunDir
from experiments.settings import Runtime, UserError
from experiments.train import train

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and what it imports warn of much

BLIMP = [("The cats sleep.", "The cats sleeps."), ("def f(x):", "def x(f:"), ("return None", "None return")] * 3
ARC = [
    {
        "question": f"What is {n}?",
        "choices": {"text": ["one", "two", str(n)], "label": ["A", "B", "C"]},
        "answerKey": "C",
    }
    for n in range(6)
] + [{"question": "And?", "choices": {"text": ["yes", "no"], "label": ["1", "2"]}, "answerKey": "1"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its shards, benchmarks and held-out text."""
    folder = tmp_path_factory.mktemp("eval")
    os.environ["HF_HOME"], os.environ["HF_HUB_OFFLINE"] = str(folder / "home"), "1"
    shards = build_shards(folder)
    run_dir = RunDir.create(folder / "runs", study_run(shards, seq_len=128))
    assert train(run_dir, shards, Runtime(device="cpu"), lambda: False) == "final"
    (folder / "data" / "blimp").mkdir(parents=True)
    lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in BLIMP]
    (folder / "data" / "blimp" / "adjunct_island.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "data" / "arc_easy").mkdir()
    (folder / "data" / "arc_easy" / "validation.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in ARC))
    (folder / "held-out").mkdir()
    (folder / "held-out" / "tales.test.txt").write_text("Once upon a time.\n\x1e\nThere was a tail.\n" * 40)
    (folder / "held-out" / "tales.train.txt").write_text("not this")
    return folder


@pytest.fixture
def finished(place: Path) -> Finished:
    return open_finished(next((place / "runs").iterdir()), place / "data")


def log_likelihood(finished: Finished, context: str, answer: str) -> float:
    """Of the answer behind the context, straight from the run's model; the harness's rule of where spaces belong."""
    tokenizer, model = finished.shards.tokenizer, finished.load_model()
    whole = [0, *tokenizer.encode(context + answer, add_special_tokens=False).ids]
    begin = 1 + len(tokenizer.encode(context, add_special_tokens=False).ids)
    with torch.no_grad():
        log_p_TV = model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
    return float(sum(log_p_TV[i - 1, whole[i]] for i in range(begin, len(whole))))


def best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def write_items(folder: Path, task: str, **splits: list[dict[str, Any]]) -> Path:
    (folder / task).mkdir(parents=True)
    for split, docs in splits.items():
        (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return folder


def result_of(results: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (one,) = [result for result in results if result["benchmark"] == name]
    return one


def test_scores_are_those_of_the_model_item_by_item_and_each_is_made_once(place: Path, finished: Finished) -> None:
    asked = Asked([Benchmark("blimp"), Benchmark("arc_easy"), Benchmark("piqa"), *PAPER[:1]], place / "data", batch=4)
    report = evaluate([finished], asked)

    blimp = result_of(report.results, "blimp")
    # The harness puts its space before an answer even where nothing stands before it.
    expected = [log_likelihood(finished, "", f" {a}") > log_likelihood(finished, "", f" {b}") for a, b in BLIMP]
    assert blimp["items"]["acc"] == {"blimp_adjunct_island": "".join(str(int(right)) for right in expected)}
    share = sum(expected) / len(expected)
    found = blimp["metrics"]["acc"]
    assert found["value"] == pytest.approx(share)
    assert found["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(expected) - 1)))
    assert blimp["chance"] == 0.5

    arc = result_of(report.results, "arc_easy")
    right = ""
    for doc in ARC:
        context, choices = f"Question: {doc['question']}\nAnswer:", doc["choices"]
        chosen = best([log_likelihood(finished, context, f" {text}") for text in choices["text"]])
        right += str(int(choices["label"][chosen] == doc["answerKey"]))
    assert arc["items"]["acc"] == {"arc_easy": right}
    assert arc["chance"] == pytest.approx((6 / 3 + 1 / 2) / 7)
    assert report.skipped["piqa"].startswith("no piqa/validation.jsonl in ")
    assert report.skipped["pile"].startswith("the text is no longer published")

    files = {path: path.stat().st_mtime_ns for path in (finished.run_dir.path / "evals").iterdir()}
    assert {path.name for path in files} == {
        f"{name}@1.0_lm-eval-{harness.version()}.json" for name in ("blimp", "arc_easy")
    }
    again = evaluate([finished], asked)
    assert {path: path.stat().st_mtime_ns for path in (finished.run_dir.path / "evals").iterdir()} == files
    assert sorted(again.results, key=str) == sorted(report.results, key=str)


def test_a_part_never_stands_in_for_the_whole(place: Path, finished: Finished) -> None:
    part = evaluate([finished], Asked([Benchmark("blimp")], place / "data", limit=4)).results[0]
    whole = evaluate([finished], Asked([Benchmark("blimp")], place / "data")).results[0]
    assert (part["n"], part["limit"], whole["n"], whole["limit"]) == (4, 4, len(BLIMP), None)


def test_a_dry_run_scores_nothing(place: Path, finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((finished.run_dir.path / "evals").glob("*"))
    evaluate([finished], Asked([Benchmark("blimp")], place / "data", limit=2), dry_run=True)
    assert (
        f"to score: allocation rho 0.50 seed 0, blimp@1.0_lm-eval-{harness.version()}_limit-2"
        in capsys.readouterr().out
    )
    assert sorted((finished.run_dir.path / "evals").glob("*")) == before


def test_nothing_to_score_is_an_error_that_says_why(place: Path, finished: Finished) -> None:
    with pytest.raises(UserError, match=r"nothing can be scored: popqa_15shot: the harness has no such task"):
        evaluate([finished], Asked(choose(["popqa_15shot"]), place / "data"))


def test_bits_per_byte_of_held_out_text_document_by_document(place: Path, finished: Finished) -> None:
    path = find_domains(place / "held-out")["tales"]
    assert path.name == "tales.test.txt"
    model, shards = finished.load_model(), finished.shards
    found = bits_per_byte(model, shards, path, seq_len=16, batch=3, limit=3)
    nats, sizes = [], []
    for text in [
        "Once upon a time.\n",
        "There was a tail.\nOnce upon a time.\n",
        "There was a tail.\nOnce upon a time.\n",
    ]:
        ids = [shards.bos_id, *shards.tokenizer.encode(text, add_special_tokens=False).ids]
        total = 0.0
        for start in range(0, len(ids) - 1, 16):
            window = torch.tensor([ids[start : start + 17]])
            with torch.no_grad():
                log_p_TV = model(window[:, :-1], draws_B=torch.tensor([-1]))[0].log_softmax(-1)
            total -= float(log_p_TV.gather(-1, window[0, 1:, None]).sum())
        nats.append(total)
        sizes.append(len(text.encode()))
    assert found["items"]["nats"] == pytest.approx(nats, abs=1e-3)
    assert found["items"]["bytes"] == sizes
    assert found["metrics"]["bits_per_byte"]["value"] == pytest.approx(sum(nats) / math.log(2) / sum(sizes), rel=1e-5)


def test_the_standard_error_of_a_ratio_covers() -> None:
    """95 percent intervals over 2000 draws of 60 documents hold the truth in 92 to 97 percent."""
    import numpy as np

    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        below = rng.integers(50, 500, 60)
        value, stderr = ratio(2.0 * below + rng.normal(0, 40, 60), below)
        assert stderr is not None
        hits += abs(value - 2.0) < 1.96 * stderr
    assert 0.92 < hits / 2000 < 0.97


def test_strata_of_a_benchmark_give_its_standard_error() -> None:
    """As for one sample where tasks are alike, and smaller where the spread lies between tasks."""
    alike = harness.summary([[0.0, 1.0] * 50, [1.0, 0.0] * 50])
    assert alike["stderr"] == pytest.approx(math.sqrt(0.25 / 199), rel=0.01)
    apart = harness.summary([[0.0] * 100, [1.0] * 100])
    assert (apart["value"], apart["stderr"]) == (0.5, 0.0)


def test_a_metric_that_is_no_mean_is_put_together_as_the_harness_does() -> None:
    def perplexity(items: list[float]) -> float:
        return math.exp(-sum(items) / len(items))

    assert harness.summary([[-3.2], [-4.0]], perplexity) == {"value": pytest.approx(math.exp(3.6)), "stderr": None}


def test_tasks_of_several_kinds_are_scored_by_what_they_share_and_chance_is_told_item_by_item() -> None:
    class Task:
        def __init__(self, kind: str) -> None:
            self.OUTPUT_TYPE = kind

    rows = {
        "choose": [{"metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": 0.0, "resps": [0] * 4}] * 2,
        "write": [{"metrics": ["acc"], "acc": 0.0, "resps": [0]}] * 2,
    }
    tasks = {"choose": Task("multiple_choice"), "write": Task("generate_until")}
    assert harness._shared_metrics(rows) == ["acc"]
    assert harness._chance(Benchmark("both", guess=0.0), tasks, rows) == pytest.approx((0.25 + 0.0) / 2)
    assert (
        harness._chance(Benchmark("letters", metric="exact_match"), {"write": tasks["write"]}, {"write": rows["write"]})
        is None
    )
    assert harness._chance(Benchmark("drop", metric="f1"), tasks, rows) is None
    assert harness._chance(Benchmark("lambada"), {"write": Task("loglikelihood")}, {"write": rows["write"]}) == 0


def test_a_metric_that_a_task_lacks_skips_its_benchmark_alone(finished: Finished, tmp_path: Path) -> None:
    data = write_items(tmp_path, "piqa", validation=[{"goal": "Sit.", "sol1": "Down.", "sol2": "Up.", "label": 0}] * 3)
    write_items(tmp_path, "arc_easy", validation=ARC)
    report = evaluate([finished], Asked([Benchmark("piqa", metric="f1"), Benchmark("arc_easy")], data))
    assert report.skipped["piqa"].startswith("piqa has no metric f1 in all of its tasks, only acc, acc_norm")
    assert [result["benchmark"] for result in report.results] == ["arc_easy"]


@pytest.mark.parametrize(("value", "words"), [(0.55, "at chance, 0.5000"), (0.62, "above chance, 0.5000")])
def test_a_model_at_chance_is_called_at_chance(value: float, words: str) -> None:
    result = {"benchmark": "blimp", "metric": "acc", "chance": 0.5, "n": 100}
    assert words in in_words(result | {"metrics": {"acc": {"value": value, "stderr": 0.05}}})


def test_groups_are_chosen_by_name_each_task_once() -> None:
    chosen = choose(["small,hellaswag", "arc_easy_25shot", "my_task"])
    assert [b.name for b in chosen] == [*(b.name for b in GROUPS["small"]), "arc_easy_25shot", "my_task"]
    assert chosen[-2] == Benchmark("arc_easy", 25)
    assert TEXT in chosen
    with pytest.raises(UserError, match="--tasks names nothing"):
        choose([","])


@pytest.fixture
def stock() -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def test_shots_come_from_no_item_that_is_scored(place: Path, stock: Path, tmp_path: Path) -> None:
    said = local_tasks("arc_easy", 25, place / "data", stock, tmp_path)
    assert isinstance(said, str)
    assert said.endswith("shots must not come from what is scored")
    data = write_items(tmp_path / "few", "arc_easy", train=ARC[:3], validation=ARC)
    said = local_tasks("arc_easy", 25, data, stock, tmp_path)
    assert said == "25 shots need as many items in arc_easy/train.jsonl, which holds 3"


def test_shots_come_from_the_local_train_file(finished: Finished, tmp_path: Path) -> None:
    """One item to train on leaves no choice: it stands, solved, before every question, as the model itself reads it."""
    shot = {"question": "Who?", "choices": {"text": ["me", "you"], "label": ["A", "B"]}, "answerKey": "B"}
    data = write_items(tmp_path, "arc_easy", train=[shot], validation=ARC)
    (result,) = evaluate([finished], Asked([Benchmark("arc_easy", 1)], data)).results
    right = ""
    for doc in ARC:
        choices = doc["choices"]
        context = f"Question: Who?\nAnswer: you\n\nQuestion: {doc['question']}\nAnswer:"
        chosen = best([log_likelihood(finished, context, f" {text}") for text in choices["text"]])
        right += str(int(choices["label"][chosen] == doc["answerKey"]))
    assert (result["benchmark"], result["shots"], result["truncated"]) == ("arc_easy_1shot", 1, 0)
    assert result["items"]["acc"] == {"arc_easy": right}


def test_an_answer_longer_than_the_window_skips_its_benchmark_alone(finished: Finished, tmp_path: Path) -> None:
    """A question that is too long loses its beginning and is counted; an answer that is cannot be cut."""
    asked = [Benchmark("piqa"), Benchmark("arc_easy")]
    item = {"goal": "Sit.", "sol1": "Down.", "sol2": "Up.", "label": 0}
    data = write_items(tmp_path, "piqa", validation=[item, item | {"goal": "So sit. " * 100}])
    write_items(tmp_path, "arc_easy", validation=ARC)
    report = evaluate([finished], Asked(asked, data))
    assert result_of(report.results, "piqa")["truncated"] == 2  # both choices of one item
    write_items(tmp_path / "longer", "piqa", validation=[item, item | {"sol2": "Up, up. " * 100}])
    write_items(tmp_path / "longer", "arc_easy", validation=ARC)
    report = evaluate([finished], Asked(asked, tmp_path / "longer"))
    said = "piqa cannot be scored in a window of 128 tokens: an answer is longer"
    assert report.skipped == {"piqa": said}
    assert [result["benchmark"] for result in report.results] == ["arc_easy"]


@pytest.mark.parametrize(
    ("task", "name", "text", "fields"),
    [
        (
            "hellaswag",
            "hellaswag_val_full.txt",
            "Fun: A man\n1\nsits.\nruns.\nis.\nhas.\n",
            {"label": "1", "ctx_a": "A man"},
        ),
        ("lambada_openai", "test.jsonl", '{"context": "It is", "continuation": "late"}', {"text": "It is late"}),
        ("boolq", "validation.jsonl", '{"question": "q", "passage": "p", "answer": true}', {"label": 1}),
    ],
)
def test_other_forms_are_brought_to_the_tasks_fields(
    task: str, name: str, text: str, fields: dict[str, Any], stock: Path, tmp_path: Path
) -> None:
    (tmp_path / task).mkdir()
    (tmp_path / task / name).write_text(text)
    (folder := tmp_path / "made").mkdir()
    (made,) = local_tasks(task, 0, tmp_path, stock, folder)
    assert not isinstance(made, str)
    (path,) = made.config.parent.glob("*.jsonl")
    assert fields.items() <= json.loads(path.read_text()).items()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("lambada_openai/test.jsonl", "{", "is no JSON lines file"),
        ("lambada_openai/test.jsonl", '{"context": "It"}', "lacks the field 'continuation'"),
        ("hellaswag/hellaswag_val_full.txt", "Fun: A man\n1\n", "no whole number of items of six"),
    ],
)
def test_damaged_files_are_named(name: str, text: str, said: str, stock: Path, tmp_path: Path) -> None:
    (path := tmp_path / name).parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        local_tasks(path.parent.name, 0, tmp_path, stock, tmp_path)


@pytest.mark.slow
def test_the_standard_command_gives_the_same_numbers(place: Path, finished: Finished, tmp_path: Path) -> None:
    """`lm_eval run --model hf` on the exported directory, on real BLiMP where it is there, else on the test's own."""
    from experiments.export import export_run

    shared = os.environ.get("ENGRAM_SHARED_DATA")
    data = Path(shared) / "benchmarks" if shared else place / "data"
    ours = evaluate([finished], Asked([Benchmark("blimp")], data, limit=30, batch=8)).results[0]
    export_run(finished, tmp_path / "model")
    (folder := tmp_path / "tasks").mkdir()
    import lm_eval

    made = local_tasks("blimp", 0, data, Path(lm_eval.__file__).parent / "tasks", folder)
    names = ",".join(task.name for task in made if not isinstance(task, str))
    model = f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model, "--tasks", names]
    command += ["--include_path", str(folder), "--limit", "30", "--batch_size", "8", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]
    for task, values in ours["tasks"].items():
        assert theirs[task]["acc,none"] == values["acc"], task
    for path in (tmp_path / "out").rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
        assert "".join(str(int(row["acc"])) for row in rows) == ours["items"]["acc"][task]
