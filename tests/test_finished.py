"""If these fail, what is exported or evaluated is not the model that the run ended with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_study import build_shards, study_run

from experiments.__main__ import main
from experiments.evaluate import validate
from experiments.export import model_card
from experiments.finished import Finished, open_finished
from experiments.rundir import RunDir
from experiments.settings import Runtime, UserError
from experiments.shards import valid_batches
from experiments.train import train

HERE = Runtime(device="cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards under data/, one finished run and one planned one under runs/."""
    folder = tmp_path_factory.mktemp("finished")
    shards = build_shards(folder)
    run_dir = RunDir.create(folder / "runs", study_run(shards))
    assert train(run_dir, shards, HERE, lambda: False) == "final"
    RunDir.create(folder / "runs", study_run(shards, seed=1))
    return folder


@pytest.fixture
def finished(place: Path) -> Finished:
    return open_finished(runs(place)[0].path, place / "data")


def runs(place: Path) -> list[RunDir]:
    """The finished run, then the planned one."""
    return sorted(map(RunDir, (place / "runs").iterdir()), key=lambda run_dir: run_dir.final() is None)


def score(finished: Finished, model: torch.nn.Module) -> float:
    train_ = finished.run.spec.train
    batches = valid_batches(finished.shards, train_.eval_tokens, train_.seq_len, train_.batch_tokens // train_.seq_len)
    return validate(model, batches, finished.shards.token_bytes, "fp32").nats_per_token  # type: ignore[arg-type]


def test_the_model_taken_up_again_scores_what_the_run_ended_with(finished: Finished) -> None:
    """To the bit; with its weights it must get the balancing biases too."""
    assert score(finished, finished.load_model()) == finished.final["result"]["valid_loss"]


def test_the_exported_model_scores_the_same(place: Path, finished: Finished, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from engram.modeling_engram import EngramForCausalLM

    words = [f"runtime.runs_dir={place / 'runs'}", f"runtime.data_dir={place / 'data'}"]
    assert main(["export", finished.run.spec.run_id, str(tmp_path / "model"), *words]) == 0
    model = EngramForCausalLM.from_pretrained(tmp_path / "model")
    assert score(finished, model.model) == finished.final["result"]["valid_loss"]
    tokens_BT = torch.randint(3, 320, (2, 50))
    with torch.no_grad():
        assert torch.equal(model(tokens_BT).logits, finished.load_model()(tokens_BT))
    card = (tmp_path / "model" / "README.md").read_text()
    assert card == model_card(finished)


def test_the_card_states_identity_counts_losses_and_data(finished: Finished) -> None:
    card, result = model_card(finished), finished.final["result"]
    for fact in (
        result["run_id"],
        f"{result['P_tot']:,}",
        f"{result['P_act']:,}",
        f"{result['P_engram']:,}",
        f"{result['valid_loss']:.4f} nats per token",
        f"{result['train_tokens']:,}",
        result["data"][:12],
        finished.final["cost"]["commit"],
        "n_routed_experts: 8",
    ):
        assert fact in card


def spoil_checkpoint(copy: Path) -> None:
    for path in (copy / "runs").glob("*/checkpoint/step-*/*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])


def lose_checkpoint(copy: Path) -> None:
    for path in (copy / "runs").glob("*/checkpoint"):
        shutil.rmtree(path)


def lose_shards(copy: Path) -> None:
    shutil.rmtree(copy / "data")


def diverge(copy: Path) -> None:
    for path in (copy / "runs").glob("*/final.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "diverged"}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_checkpoint, "damaged"),
        (lose_checkpoint, "no checkpoint in"),
        (lose_shards, r"no shards [0-9a-f]{12} in .*: build them again"),
        (diverge, "is diverged: its weights say nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_taken_up_is_said_in_one_line(
    spoil: Callable[[Path], None], said: str, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place, copy := tmp_path / "copy")
    spoil(copy)
    with pytest.raises(UserError, match=said) as caught:
        open_finished(next((copy / "runs").glob("*/final.json")).parent, copy / "data").load_model()
    assert "\n" not in str(caught.value)


def test_an_unfinished_run_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match="is planned: launch its suite first"):
        open_finished(runs(place)[1].path, place / "data")


def test_an_existing_directory_is_refused_before_any_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = str(runs(place)[0].path)
    assert main(["export", run_dir, str(tmp_path), f"runtime.data_dir={place / 'data'}"]) == 2
    assert f"error: {tmp_path} exists: move it away" in capsys.readouterr().err
