"""Tasks of lm-eval-harness on models in memory, against what the logits of the model say by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mergekit_bayes.errors import EvaluateError, PlanError
from mergekit_bayes.predict.harness import HarnessTask, open_tasks
from mergekit_bayes.recipe.harness import HarnessSpec, harness_mapping
from tests.harness_tasks import questions, sentences, write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(llama)


def opened(folder: Path, names: object, **keys: Any) -> tuple[HarnessTask, ...]:
    mapping = {"include_path": str(folder), **keys, "tasks": names if isinstance(names, list) else [names]}
    return open_tasks(HarnessSpec.model_validate(mapping))


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, before: str, text: str) -> float:
    """Of the tokens of `text` behind those of `before`."""
    first, second = tokenizer(before)["input_ids"], tokenizer(text)["input_ids"]
    logits = model(input_ids=torch.tensor([[*first, *second]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(first) + place - 1, token]) for place, token in enumerate(second))


def test_multiple_choice(tasks: Path, model: Any, tokenizer: Any) -> None:
    (task,) = opened(tasks, "pick")
    found = task.run(model, tokenizer, batch_size=4, title="m")
    right = [
        int(np.argmax([log_likelihood(model, tokenizer, row["question"], word) for word in row["choices"]]))
        == row["label"]
        for row in questions(10)
    ]
    acc = found.metrics["pick"]["acc"]
    assert acc.value == pytest.approx(np.mean(right))
    assert 0 < acc.value < 1
    assert acc.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(10))
    assert acc.higher_is_better is True
    assert (found.documents, task.documents) == (10, 10)


def test_likelihood_of_text(tasks: Path, model: Any, tokenizer: Any) -> None:
    (task,) = opened(tasks, "read")
    found = task.run(model, tokenizer, batch_size=3, title="m").metrics["read"]
    texts = [str(row["text"]) for row in sentences(10)]
    nats = -sum(log_likelihood(model, tokenizer, "<eos>", text) for text in texts)
    bits = nats / sum(len(text.encode()) for text in texts) / math.log(2)
    assert found["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)
    assert found["byte_perplexity"].value == pytest.approx(2**bits, rel=1e-5)
    assert found["byte_perplexity"].higher_is_better is False


def test_text_is_generated(tasks: Path, model: Any, tokenizer: Any) -> None:
    (task,) = opened(tasks, "continue")
    assert 0 <= task.run(model, tokenizer, batch_size=4, title="m").metrics["continue"]["exact_match"].value <= 1


def test_groups_have_the_scores_of_their_tasks(tasks: Path, model: Any, tokenizer: Any) -> None:
    alone = {task.name: task.run(model, tokenizer, batch_size=4, title="m") for task in opened(tasks, ["pick", "read"])}
    (group,) = opened(tasks, "both")
    found = group.run(model, tokenizer, batch_size=4, title="m")
    assert {name: found.metrics[name] for name in alone} == {name: own.metrics[name] for name, own in alone.items()}
    assert found.documents == 20


def test_a_task_says_the_same_twice_and_of_a_model_what_it_is_now(tasks: Path, model: Any, tokenizer: Any) -> None:
    """Solved examples are drawn; the weights are those that the model has when it is asked."""
    (task,) = opened(tasks, "pick", num_fewshot=2)
    first = task.run(model, tokenizer, batch_size=4, title="m")
    assert task.run(model, tokenizer, batch_size=4, title="m") == first
    assert first != opened(tasks, "pick")[0].run(model, tokenizer, batch_size=4, title="m")
    head = model.get_output_embeddings().weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.neg_()
        assert task.run(model, tokenizer, batch_size=4, title="m") != first
        head.copy_(kept)


def test_only_some_documents(tasks: Path, model: Any, tokenizer: Any) -> None:
    for limit, count in ((4, 4), (0.25, 3), (100, 10)):
        (task,) = opened(tasks, "pick", limit=limit)
        assert task.documents == count
        assert task.run(model, tokenizer, batch_size=4, title="m").documents == count


def test_nothing_else_is_disturbed(
    tasks: Path, model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    for task in opened(tasks, ["pick", "read"]):
        task.run(model, tokenizer, batch_size=4, title="m")
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_what_scores_depend_on(tasks: Path, tmp_path: Path) -> None:
    def key(folder: Path, **keys: Any) -> str:
        return json.dumps(opened(folder, "pick", **keys)[0].identity, sort_keys=True)

    first = key(tasks)
    assert key(tasks) == first
    assert len({first, key(tasks, num_fewshot=1), key(tasks, limit=3), key(tasks, max_length=20)}) == 4
    other = write_tasks(tmp_path / "tasks")
    path = other / "pick.yaml"
    path.write_text(path.read_text().replace('doc_to_text: "', 'doc_to_text: "So '))
    changed = key(other)
    assert changed != first
    write_tasks(other, count=9)
    path.write_text(path.read_text().replace('doc_to_text: "', 'doc_to_text: "So '))
    assert key(other) not in (first, changed)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness without tasks of its own, whose index takes seconds."""
    import lm_eval.tasks

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, include_path: str | None = None, *, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)


@pytest.mark.usefixtures("few")
def test_tasks_that_are_not_there(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        opened(tasks, ["pikc", "pick", "nonsense of mine"])
    first, second = str(caught.value).splitlines()
    assert first.startswith("lm_eval: there is no task pikc. Did you mean `pick`? `lm_eval ls tasks` lists those")
    assert first.endswith("tasks has both, continue, pick, read")
    assert "there is no task nonsense of mine" in second
    with pytest.raises(EvaluateError, match=r"lm_eval.include_path: there is no folder nowhere"):
        opened(Path("nowhere"), "pick")
    text = (tasks / "pick.yaml").read_text()
    (tmp_path / "lost.yaml").write_text(
        text.replace("questions.jsonl", "nothing.jsonl").replace("task: pick", "task: lost")
    )
    with pytest.raises(PlanError, match="lm_eval task lost: cannot be loaded: "):
        opened(tmp_path, "lost")


def test_a_failure_names_model_and_task(tasks: Path, tmp_path: Path, model: Any, tokenizer: Any) -> None:
    text = (tasks / "pick.yaml").read_text()
    (tmp_path / "odd.yaml").write_text(
        text.replace("{{question}}", "{{nothing.at.all if label == 2 else question}}").replace(
            "task: pick", "task: odd"
        )
    )
    (task,) = opened(tmp_path, "odd")
    with pytest.raises(EvaluateError, match="model mine: lm_eval task odd: UndefinedError: "):
        task.run(model, tokenizer, batch_size=4, title="mine")


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, tasks: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(EvaluateError, match=r"pip install 'mergekit_bayes\[lm-eval\]' installs it"):
        opened(tasks, "pick")


def test_short_forms() -> None:
    for short in ("a", ["a"], {"tasks": "a"}):
        assert HarnessSpec.model_validate(harness_mapping(short)) == HarnessSpec(tasks=("a",))
