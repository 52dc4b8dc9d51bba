"""The committed artefacts: small, loadable, without local paths, and each adapter best in its own domain."""

from __future__ import annotations

import json
import stat

import pytest
import torch

from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.sidecar import check_sidecar, find_sidecar, open_sidecar

DOMAINS = ("code", "docs", "headers")
LARGEST_TOTAL = 12 * 1024**2
MARGIN = 0.15

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def losses(example) -> dict[str, dict[str, float]]:
    """Held-out loss of every artefact on every domain, on a small part of the text."""
    from evaluate import ARTEFACTS, evaluate, held_out_tokens, load_model

    tokens = held_out_tokens(characters=16_000)
    return {name: evaluate(load_model(ARTEFACTS / name), tokens) for name in ("base", *DOMAINS)}


@pytest.mark.parametrize("domain", DOMAINS)
def test_adapter_wins_its_own_domain(losses, domain):
    others = min(row[domain] for name, row in losses.items() if name != domain)
    assert losses[domain][domain] < others - MARGIN


@pytest.mark.parametrize("domain", DOMAINS)
def test_adapter_loses_elsewhere(losses, domain):
    for other in DOMAINS:
        if other != domain:
            assert losses[domain][other] > min(losses["base"][other], losses[other][other]) + MARGIN


def test_base_is_a_language_model(losses):
    assert all(loss < 5.5 for loss in losses["base"].values()), "a uniform guess over the vocabulary costs 8.3"


def test_artefacts_and_text_stay_small(example):
    files = [path for part in ("artefacts", "held_out") for path in (example / part).rglob("*") if path.is_file()]
    assert len(files) >= 15
    assert sum(path.stat().st_size for path in files) <= LARGEST_TOTAL


def test_files_are_plain_and_name_no_local_path(example):
    for path in (example / "artefacts").rglob("*"):
        if path.is_file():
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode & 0o044 == 0o044, path
            assert not mode & 0o111, path
        if path.suffix in {".json", ".md"}:
            text = path.read_text(encoding="utf-8")
            assert not any(root in text for root in ("/root", "/home", "/work", "/tmp", "/opt")), path


@pytest.mark.parametrize("domain", DOMAINS)
def test_adapter_config_is_ordinary_lora_beside_its_base(example, domain):
    config = json.loads((example / "artefacts" / domain / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "base"
    assert (config["r"], config["lora_alpha"], config["bias"]) == (8, 16, "none")
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize("domain", DOMAINS)
def test_sidecar_describes_the_adapter(example, domain):
    adapter = open_adapter(example / "artefacts" / domain)
    base = open_checkpoint(example / "artefacts" / "base")
    found = find_sidecar(adapter.folder)
    assert found is not None
    sidecar = open_sidecar(found)
    problems = check_sidecar(
        sidecar,
        mean_tensors=adapter.tensors,
        mean_fingerprint=fingerprint(adapter.tensors),
        base_fingerprint=fingerprint(base.tensors),
    )
    assert not problems
    assert sidecar.tensors.keys() == adapter.tensors.keys()
    assert (sidecar.metadata.space, sidecar.metadata.estimator) == ("factor", "ivon")


@pytest.mark.parametrize("domain", DOMAINS)
def test_precision_exceeds_its_prior_and_is_informative(example, domain):
    sidecar = open_sidecar(example / "artefacts" / domain)
    prior = sidecar.metadata.prior_precision
    reader = BlockReader()
    values = torch.cat([reader.read_tensor(info).flatten() for info in sidecar.tensors.values()])
    assert values.dtype == torch.float32
    assert bool((values >= prior).all())
    assert values.median() > 1.5 * prior


def test_adapters_start_from_different_factors(example):
    reader = BlockReader()
    first, *others = [
        torch.cat(
            [
                reader.read_tensor(module.a).flatten()
                for module in open_adapter(example / "artefacts" / name).modules.values()
            ]
        ).float()
        for name in DOMAINS
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.2
