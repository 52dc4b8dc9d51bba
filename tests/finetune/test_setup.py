"""What a run is made of, and what is refused before its first step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mergekit_bayes.errors import CheckpointError, FinetuneError
from mergekit_bayes.finetune import setup as preparation
from mergekit_bayes.finetune.checkpoints import Checkpoint
from mergekit_bayes.finetune.run import finetune
from mergekit_bayes.finetune.setup import check_agreement, check_fit
from mergekit_bayes.finetune.state import restore
from mergekit_bayes.recipe import FinetuneRecipe, load_recipe
from tests.finetune.runs import recipe, run
from tests.finetune.tiny_rows import text_rows

CHAT = (
    "{% for message in messages %}{{ message['role'] }} {% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %} {% endfor %}"
)


def test_processes_that_see_different_things_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two: Any = SimpleNamespace(num_processes=2)
    identity: Any = SimpleNamespace(data="d", base="b")
    others = {"training rows": "d", "weights of the base": "b", "step to begin from": 0}
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, others])
    check_agreement(two, identity, 0)
    with pytest.raises(FinetuneError, match="differ in step to begin from: 12, 0; expected the same everywhere"):
        check_agreement(two, identity, 12)
    identity.data = "other"
    with pytest.raises(FinetuneError, match="differ in training rows: other, d"):
        check_agreement(two, identity, 0)
    check_agreement(SimpleNamespace(num_processes=1), identity, 0)  # type: ignore[arg-type]


def fit(**loaded: Any) -> None:
    content = recipe(Path("base"), training={"fp16": True})
    model = torch.nn.Linear(2, 2, dtype=loaded.pop("dtype", torch.float32))
    known = SimpleNamespace(**{"vocabulary": 48, "longest_row": None, **loaded}, model=model)
    data: Any = SimpleNamespace(train=text_rows(4), eval={"dev": text_rows(2, longest=12, shortest=12)})
    check_fit(load_recipe(content, expect=FinetuneRecipe), known, data)  # type: ignore[arg-type]


def test_data_model_and_options_must_fit_each_other() -> None:
    fit()
    with pytest.raises(FinetuneError, match=r"the data holds token \d+, the embedding has 20 rows"):
        fit(vocabulary=20)
    with pytest.raises(FinetuneError, match="the longest row has 12 tokens, base has places for 11"):
        fit(longest_row=11)
    with pytest.raises(FinetuneError, match=r"training\.fp16: the loss is scaled for weights in float32"):
        fit(dtype=torch.bfloat16)


def test_a_model_that_mixes_up_packed_rows_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "packing_fault", lambda *_, **__: "segments see each other")
    with pytest.raises(FinetuneError, match=r"data\.packing: .* cannot train on packed rows: segments see each other"):
        run(recipe(llama, data={"packing": True, "max_length": 16}), tmp_path / "out")


def test_conversations_are_learned_and_their_template_is_kept(llama: Path, tmp_path: Path) -> None:
    import transformers

    (tmp_path / "chat.jinja").write_text(CHAT)
    rows = [
        {"messages": [{"role": "user", "content": f"w{n} w{n + 1}"}, {"role": "assistant", "content": f"w{n + 2}"}]}
        for n in range(12)
    ]
    content = recipe(llama, data={"train": "chats", "eval": None, "chat_template": "chat.jinja"})
    result = finetune(content, tmp_path / "out", tables={"chats": rows}, recipe_dir=tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.folder)
    assert tokenizer.chat_template == CHAT
    assert result.report["units"]["in_data"] < result.report["units"]["seen"]


def test_a_recipe_file_finds_its_data_beside_it(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"w{n} w{n + 1} w{n + 2}"}) + "\n" for n in range(9))
    )
    content = recipe(llama, data={"train": "rows.jsonl", "eval": None}, training={"max_steps": 2})
    (folder / "recipe.yaml").write_text(json.dumps({**content, "output": {"path": str(tmp_path / "out")}}))
    assert finetune(folder / "recipe.yaml").folder == tmp_path / "out"
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (["a"], (2,), "lacks b; expected"),
        (["a", "b", "c"], (2,), "holds c; expected"),
        (["a", "b"], (3,), r"a has shape \(3,\); expected \(2,\)"),
        (["b", "a"], (2,), "another order"),
    ],
)
def test_a_checkpoint_of_other_parameters_changes_nothing(
    names: list[str], shape: tuple[int, ...], message: str
) -> None:
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("a", "b")}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    state = {"parameters": names, "counters": {"step": 1}}
    checkpoint = Checkpoint(1, {name: torch.zeros(shape) for name in names}, optimizer.state_dict(), "", state)
    with pytest.raises(CheckpointError, match=message):
        restore(checkpoint, parameters, optimizer)
    assert all(torch.equal(p.detach(), torch.ones(2)) for p in parameters.values())
