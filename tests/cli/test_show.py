"""`lowres list methods` and `lowres show method` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from lowres.core import registry
from lowres.core.errors import InputError
from lowres.core.method import Taxonomy
from tests.cli.test_cli import lowres

TINY = "package:lowres/assets/tiny_lm"


def test_methods_are_listed_by_their_class() -> None:
    """Reference: what the imported classes say. The listing itself imports none of them."""
    lines = lowres("list", "methods").stdout.splitlines()
    listed: dict[str, str] = {}
    group = ""
    for line in lines[1:]:
        if line.startswith("    "):
            listed[line.split()[0]] = group
        else:
            group = line.strip()
    methods: dict[str, Any] = {n: registry.load("method", n) for n in registry.names("method")}
    assert listed == {name: cls.taxonomy for name, cls in methods.items()}
    assert set(listed.values()) <= set(Taxonomy.__args__)


def test_listing_methods_imports_no_torch() -> None:
    """Behaviour: a listing must answer at once."""
    code = (
        "import sys; sys.argv = ['lowres', 'list', 'methods']\n"
        "from lowres.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "lora" in done.stdout, done.stderr


@pytest.mark.parametrize("name", registry.names("method"))
def test_every_method_can_be_shown(name: str) -> None:
    """Behaviour: in this process; what every method must say is there."""
    from typer.testing import CliRunner

    from lowres.cli.show import app

    done = CliRunner().invoke(app, ["method", name, "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.output)
    assert shown["taxonomy"] in Taxonomy.__args__
    assert shown["paper"], "the module docstring names its paper, or says none"
    low, high = shown["learning_rates"]
    assert 0 < low <= high
    assert isinstance(shown["mergeable"], bool)
    text = CliRunner().invoke(app, ["method", name]).output
    for word in ("class: ", "mergeable: ", "starts as the checkpoint: ", "refuses: ", "keys",
                 "over weights in fewer bits: ", "saves, beside full fine-tuning: "):  # fmt: skip
        assert word.strip() in text


def test_a_method_is_counted_on_a_model(command: Callable[..., Any]) -> None:
    """Closed form: LoRA of rank r on queries and values of L blocks of width D: 4 L r D."""
    done = command(
        "show", "method", "lora", "--model", TINY, "--set", "method.rank=4", "--json"
    )  # fmt: skip
    told = json.loads(done.stdout)["counts"]
    assert told["trainable"] == 4 * 6 * 4 * 256
    assert told["share"] == told["trainable"] / told["model"]
    assert f"{told['trainable']:,}" in command(
        "show", "method", "lora", "--model", TINY, "--set", "method.rank=4"
    ).stdout  # fmt: skip


def test_what_runs_told_is_shown_as_it_was_recorded(command: Callable[..., Any]) -> None:
    """Reference: the records."""
    from benchmarks.methods_found import found

    rates = {one["task"]: one for one in found()["lora"]["rates"]}
    assert rates["sst2"]["rate"] == 0.008
    assert rates["sst2"]["tried"] == [0.0005, 0.002, 0.008, 0.032]
    shown = command("show", "method", "lora").stdout
    assert "as good as the best of 0.0005, 0.002, 0.008, 0.032 in runs: 0.008 (sst2, " in shown
    assert "over weights in fewer bits: 4 bits and 8 bits" in shown
    assert "no: it trains the checkpoint's own" in command("show", "method", "full").stdout


@pytest.mark.parametrize("name", registry.names("method"))
def test_what_is_counted_is_the_method_as_a_recipe_has_it(name: str) -> None:
    """Reference: the method with its own defaults, and not those that the tests give it."""
    from typer.testing import CliRunner

    from lowres.cli.show import app
    from lowres.planning.assumed import config_of
    from lowres.planning.counts import counts

    done = CliRunner().invoke(app, ["method", name, "--model", TINY, "--json"])
    try:
        wanted = counts(registry.load("method", name)(), config_of(TINY)).trainable
    except InputError as error:
        assert str(done.exception) == str(error)
    else:
        assert json.loads(done.stdout)["counts"]["trainable"] == wanted


@pytest.mark.parametrize(
    "words, told",
    [
        (["method", "lorra"], "did you mean 'lora'?"),
        (["lever", "nf4_weights", "--model", TINY], "--model counts what a method trains"),
        (["method", "lora", "--set", "method.rank=4"], "goes with --model"),
        (["method", "lora", "--model", TINY, "--set", "method.rnak=4"], "did you mean 'rank'?"),
        (["method", "lora", "--model", "./nowhere"], "there is no such folder"),
    ],
)
def test_wrong_words_exit_2_with_one_message(
    words: list[str], told: str, command: Callable[..., Any]
) -> None:
    """Behaviour: and nothing is printed before it."""
    done = command("show", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert told in done.stderr
