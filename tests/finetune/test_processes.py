"""Two processes, plain, sharded and through Accelerate: they train what one process trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes import IVON
from mergekit_bayes.finetune import diagnose, export_precision, starting_values
from mergekit_bayes.finetune.ivon import optimizer as optimizer_module
from mergekit_bayes.finetune.ivon.noise import stream_key
from tests.finetune.scenarios import OPTIONS, llama, llama_loss, network, network_loss, state_of, train

ROOT = Path(__file__).parent.parent.parent
Outcomes = list[dict[str, Any]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What the two processes saw; they run once, because importing what they need takes most of the time."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    command = [sys.executable, "-m", "tests.finetune.two_processes"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def both(outcomes: Outcomes, name: str, key: str) -> Any:
    """What both saw alike."""
    one, other = (outcome[name][key] for outcome in outcomes)
    if isinstance(one, list) and isinstance(one[0], torch.Tensor):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    else:
        assert one == other
    return one


def close(seen: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(seen) == len(expected)
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_08_ddp_with_shared_noise_equals_one_process(outcomes: Outcomes) -> None:
    model = network(5, 3)
    optimizer = IVON(model.parameters(), **OPTIONS)
    train(model, optimizer, network_loss)
    close(both(outcomes, "shared noise", "state"), state_of(model, optimizer))


def test_noise_per_process_ends_in_one_posterior(outcomes: Outcomes) -> None:
    """Gradients, curvature estimates, skipped steps and unused parameters are agreed on."""
    *_, spare, spare_hess = state = both(outcomes, "own noise", "state")
    assert both(outcomes, "own noise", "skipped") == 1
    assert not torch.equal(spare, torch.ones(3))
    assert not torch.equal(spare_hess, torch.full((3,), 0.5))
    # two samples, not one twice
    assert not torch.allclose(state[2], outcomes[0]["shared noise"]["state"][2], rtol=1e-3)


def test_noise_per_process_is_one_process_with_as_many_samples(
    outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sample sees its half of the batch; what is averaged is gradient times noise, not each of them."""

    def of_process(seed: int, draw: int, sample: int, *, purpose: int, rank: int = 0) -> int:
        return stream_key(seed, draw, 0, purpose=purpose, rank=sample)

    monkeypatch.setattr(optimizer_module, "stream_key", of_process)
    model, spare = network(5, 3), torch.nn.Parameter(torch.ones(3))
    optimizer = IVON([*model.parameters(), spare], **OPTIONS, mc_samples=2)
    for step in range(5):
        for number in range(2):
            with optimizer.sampled_params(train=True):
                network_loss(model, step, slice(4 * number, 4 * number + 4)).backward()
                if number == 1:
                    (spare**2).sum().backward()
        if step == 3:
            next(model.parameters()).grad[0] = float("nan")  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
    expected = [*state_of(model, optimizer), spare.detach(), optimizer.state[spare]["hess"]]
    close(both(outcomes, "own noise", "state"), expected)


def test_noise_per_process_with_gradients_averaged_before_is_refused(outcomes: Outcomes) -> None:
    """The wrong combination: curvature would come out too small and different everywhere, without a word."""
    message = both(outcomes, "own noise, averaged before", "error")
    assert "the same in all processes" in message
    assert "no_sync" in message


@pytest.mark.parametrize(
    ("name", "widths", "samples", "placements"),
    [
        ("sharded", (5, 3), 1, ["(Shard(dim=0),)"]),
        ("sharded, two samples", (5, 3), 2, ["(Shard(dim=0),)"]),
        ("sharded by columns", (6, 4), 1, ["(Shard(dim=0),)", "(Shard(dim=1),)"]),
    ],
)
def test_shards_are_trained_like_the_whole(
    outcomes: Outcomes, name: str, widths: tuple[int, ...], samples: int, placements: list[str]
) -> None:
    """`fully_shard`: every process draws the noise of its shards, and the model gathers one process's sample."""
    model = network(*widths)
    optimizer = IVON(model.parameters(), **OPTIONS, mc_samples=samples)
    at_mean = torch.tensor(train(model, optimizer, network_loss))
    close(both(outcomes, name, "state"), state_of(model, optimizer))
    assert both(outcomes, name, "placements") == placements
    assert both(outcomes, name, "like_parameter")
    # losses at the mean between steps: no copy of a sample was left over
    halves = [torch.tensor(outcome[name]["at_mean"]) for outcome in outcomes]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, at_mean)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT
@pytest.mark.parametrize(("name", "adapter"), [("sharded llama", False), ("sharded adapter", True)])
def test_a_transformer_in_shards_is_trained_like_the_whole(outcomes: Outcomes, name: str, adapter: bool) -> None:
    model = llama(adapter=adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = IVON(trained, **OPTIONS)
    at_mean = torch.tensor(train(model, optimizer, llama_loss))
    close(both(outcomes, name, "state"), state_of(model, optimizer))
    halves = [torch.tensor(outcome[name]["at_mean"]) for outcome in outcomes]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, at_mean)
    ratio = diagnose(optimizer).noise_to_weight
    assert both(outcomes, name, "noise_to_weight") == pytest.approx(ratio, rel=1e-4)
    start = starting_values(trained, units_seen=100, steps=10).hess_init
    assert both(outcomes, name, "hess_init") == pytest.approx(start, rel=1e-4)
    precision = export_precision(optimizer, [("first", trained[0])], num_examples=10).precisions["first"]
    torch.testing.assert_close(outcomes[1][name]["precision"], precision, rtol=1e-4, atol=1e-6)


def test_shards_agree_on_a_gradient_that_is_not_finite(outcomes: Outcomes) -> None:
    """It was so in one process only. Both skip the step: what it did to the model, it would have done to all."""
    assert both(outcomes, "sharded, one spoiled", "skipped") == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in both(outcomes, "sharded, one spoiled", "state"))


def test_gathered_weights_are_those_the_context_promises(outcomes: Outcomes) -> None:
    """Without a backward pass `fully_shard` keeps its gathered copy: stale, unless the context drops it."""
    model = network(6, 4)
    optimizer = IVON(model.parameters(), **OPTIONS)
    expected = []
    with torch.no_grad():
        for sample in (0, 1, 0):
            expected.append(float(network_loss(model, 0, slice(None))))
            with optimizer.sampled_params(sample=sample):
                expected.append(float(network_loss(model, 0, slice(None))))
    assert both(outcomes, "prediction", "losses") == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 6) for loss in expected}) == 3


def test_shards_without_their_model_are_refused(outcomes: Outcomes) -> None:
    unbound, own_noise, strange = both(outcomes, "unbound", "messages")
    assert "bind(model)" in unbound
    assert "expected 'shared'" in own_noise
    assert "6 trainable parameters of the optimizer are not parameters of the model" in strange


def test_a_sharded_checkpoint_resumes_bit_for_bit(outcomes: Outcomes) -> None:
    """torch.distributed.checkpoint, saved in shards; the new optimizer had other values before."""
    resumed, straight = both(outcomes, "resumed", "state"), outcomes[0]["sharded"]["state"]
    assert all(torch.equal(one, other) for one, other in zip(resumed, straight, strict=True))


def test_a_gathered_checkpoint_of_two_resumes_in_one(outcomes: Outcomes) -> None:
    """Saved by two processes, gone on with by one: names in place of numbers, whole tensors in place of shards."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    model = network(5, 3)
    model.load_state_dict(outcomes[0]["resumed"]["means"])
    optimizer = IVON(model.parameters(), **OPTIONS)
    state = outcomes[0]["resumed"]["gathered"]
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    train(model, optimizer, network_loss, steps=range(2, 4))
    close(state_of(model, optimizer), outcomes[0]["sharded"]["state"])


def test_accelerate_with_two_processes_equals_one_process(outcomes: Outcomes) -> None:
    """Two micro-batches each, clipped, against the whole batch at once."""
    assert both(outcomes, "prepared", "kind").endswith("MULTI_CPU")
    model = network(5, 3)
    optimizer = IVON(model.parameters(), **OPTIONS)
    train(model, optimizer, network_loss)
    close(both(outcomes, "prepared", "state"), state_of(model, optimizer))


def test_accelerate_resumes_bit_for_bit(outcomes: Outcomes) -> None:
    straight, resumed = both(outcomes, "prepared", "state"), both(outcomes, "prepared", "resumed")
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))


def test_accelerate_with_shards_equals_one_process(outcomes: Outcomes) -> None:
    assert both(outcomes, "prepared in shards", "sharded")
    model = llama(adapter=False)
    optimizer = IVON(model.parameters(), **OPTIONS)
    train(model, optimizer, llama_loss)
    close(both(outcomes, "prepared in shards", "state"), state_of(model, optimizer))
