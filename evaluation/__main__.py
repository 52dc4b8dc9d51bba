"""Lists the pages of evidence, or makes the results of one of them again.

    python -m evaluation
    python -m evaluation NAME [--out FOLDER] [--work FOLDER] [--plan]

Runs the commands of the page in order. What they train and score stays in a working folder, and is not done again by
the next call, nor by another page that needs the same. Results go beside the page unless --out says otherwise.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.pages import PAGES, ROOT_FOLDERS, Page

HERE = Path(__file__).parent
ROOT = HERE.parent
REFUSED, INTERRUPTED = 2, 130
Command = tuple[dict[str, str], list[str]]
"""Variables of the environment, and the words."""


def main(argv: Sequence[str] | None = None) -> None:
    """List, or run one page; exit code 2 for an unknown name, else that of the first command that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="of a page; without one, all are listed")
    parser.add_argument("--out", type=Path, help="folder of the results; default: beside the page")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mergekit_bayes_evaluation")
    parser.add_argument("--plan", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(argv)
    if options.name is None:
        print(listing(PAGES))
        return
    page = page_named(options.name)
    places = places_of(page, options.work.resolve(), options.out.resolve() if options.out else HERE / page.folder)
    if options.plan:
        print("\n".join(shown(each) for each in commands(page, places)))
    else:
        run(commands(page, places), places["WORK"])


def listing(pages: Sequence[Page]) -> str:
    """Name, question, minutes and needs of every page."""
    width = max(len(page.name) for page in pages)
    lines = [f"{'page':{width}}  minutes  asks"]
    for page in pages:
        lines.append(f"{page.name:{width}}  {page.minutes:7d}  {page.asks}")
        lines += [f"{'':{width}}           needs {page.needs}"] if page.needs else []
    return "\n".join([*lines, "", "`python -m evaluation NAME` makes the results of a page again."])


def page_named(name: str) -> Page:
    """The page; stops with exit code 2 and the nearest name where there is none."""
    names = {page.name: page for page in PAGES}
    wanted = name.strip("/").removeprefix("evaluation/")
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(f"no page of evidence is named {name!r}; {hint}There are {', '.join(names)}", file=sys.stderr)
        raise SystemExit(REFUSED)
    return names[wanted]


def places_of(page: Page, work: Path, out: Path) -> dict[str, str]:
    """What the words in capitals stand for.

    Pages share MODELS: what one has trained there, another need not train. Everything else is the page's own.
    """
    own = work / page.name.replace("/", "_")
    places = {word: str(own / word.lower()) for word in ROOT_FOLDERS} | {"MODELS": str(work / "models")}
    return places | {"WORK": str(work), "OUT": str(out)}


def commands(page: Page, places: Mapping[str, str]) -> list[Command]:
    """Preparations whose product is missing, then the page's commands, the last one with the place of results."""
    missing = [each.command for each in page.before if not (ROOT / _placed(each.makes, places)).exists()]
    folders = [each.makes for each in page.before if each.makes.startswith("FOLDER/")]
    *first, last = page.commands
    asked = [*missing, *first, f"{last} --out OUT".replace("FOLDER...", " ".join(folders))]
    return [_command(each, places) for each in asked]


def _command(text: str, places: Mapping[str, str]) -> Command:
    variables: dict[str, str] = {}
    words = shlex.split(text)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = _placed(value, places)
    if "ENCODER" in text:
        places = {**places, "ENCODER": _encoder()}
    placed = [_placed(word, places) for word in words]
    return variables, [sys.executable if placed[0] == "python" else placed[0], *placed[1:]]


def _placed(word: str, places: Mapping[str, str]) -> str:
    """The word with its place: `FOLDER/adamw_1`, `model.path=ENCODER`."""
    start, equals, value = word.rpartition("=")
    head, slash, rest = value.partition("/")
    return f"{start}{equals}{places.get(head, head)}{slash}{rest}"


def _encoder() -> str:
    from evaluation.merging.packages import encoder_folder

    return str(encoder_folder())


def run(todo: Sequence[Command], work: str) -> None:
    """Run commands one after the other, from the root of the repository; stop at the first that fails."""
    print(f"working folder: {work}", file=sys.stderr)
    Path(work).mkdir(parents=True, exist_ok=True)
    for each in todo:
        variables, words = each
        print(f"+ {shown(each)}", file=sys.stderr, flush=True)
        try:
            code = subprocess.run(words, cwd=ROOT, env={**os.environ, **variables}, check=False).returncode
        except KeyboardInterrupt:
            code = INTERRUPTED
        if code:
            print(f"stopped with exit code {code}; the same command goes on from here", file=sys.stderr)
            raise SystemExit(code)


def shown(command: Command) -> str:
    """As one would type it."""
    variables, words = command
    return shlex.join([*(f"{name}={value}" for name, value in variables.items()), *words])


if __name__ == "__main__":
    main()
