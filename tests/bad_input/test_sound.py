"""What the other tests break is sound: it merges, in every space, so that each refusal has the reason it names."""

from __future__ import annotations

import pytest
from mergekit_bayes.cli.main import main

from tests.bad_input.site import Site
from tests.merge.builders import read_tensors


@pytest.mark.parametrize("space", ["dense", "product", "factor", "full"])
def test_the_sound_merge_succeeds(site: Site, space: str, capsys: pytest.CaptureFixture[str]) -> None:
    if space != "dense":
        site.use_adapters(space=space)
    with pytest.raises(SystemExit) as ended:
        main([str(site.ask()), str(site.out)])
    assert ended.value.code == 0
    assert capsys.readouterr().err == ""
    assert read_tensors(site.out, "model" if space in ("dense", "full") else "adapter_model")
