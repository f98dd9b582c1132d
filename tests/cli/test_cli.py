"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowres.cli import main
from lowres.cli.main import COMMANDS
from lowres.core import errors, paths
from tests.conftest import ROOT


def lowres(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lowres", *arguments], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **environment}, timeout=300,
    )  # fmt: skip


def test_every_help_ends_with_an_example_that_works(in_folder: Path) -> None:
    """Behaviour: the example of each help, run as it stands, in the order a user would."""
    for name in ("recipes", "benchmarks"):
        (in_folder / name).mkdir()
        for path in (ROOT / name).iterdir():
            if path.name != "schema.json":
                (in_folder / name / path.name).symlink_to(path)
    examples = {}
    for command in COMMANDS:
        done = lowres(command, "--help")
        assert done.returncode == 0, done.stderr
        found = re.findall(r"example:\s+lowres (.*(?:\n +\S.*)*)", done.stdout)
        assert found, f"{command} --help has no example"
        examples[command] = shlex.split(found[-1])
    assert len(examples) == len(COMMANDS)
    here = ("list", "show", "check", "schema", "doctor", "run", "report", "export", "bench")
    for command in here:
        done = lowres(*examples[command], cwd=in_folder)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        # Libraries that are imported on the way write to the same output.
        assert command != "export" or done.stdout.startswith("merged: merged (float32)\n")
    assert (in_folder / "recipes" / "schema.json").exists()
    assert (in_folder / "runs" / "try" / "record.json").exists()
    assert (in_folder / "report.html").exists()
    assert (in_folder / "merged" / "model.safetensors").exists()
    assert list((in_folder / "runs" / "records" / "smoke").rglob("quickstart-seed0.json"))


def test_without_a_command_it_says_what_there_is() -> None:
    """Behaviour."""
    done = lowres()
    assert "Usage" in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert all(command in done.stdout + done.stderr for command in COMMANDS)


@pytest.mark.alone
def test_listing_takes_under_0_3_seconds_without_torch() -> None:
    """Behaviour. The best of ten, so that a busy machine does not decide; and on a fast one no more
    than half as long again as importing what reads a command line.
    """
    libraries = [sys.executable, "-c", "import typer; from pydantic import Field, TypeAdapter"]
    times, least = [], []
    for _ in range(10):
        start = time.perf_counter()
        assert lowres("list").returncode == 0
        middle = time.perf_counter()
        subprocess.run(libraries, check=True)
        times.append(middle - start)
        least.append(time.perf_counter() - middle)
    assert min(times) < 0.3, times
    assert min(times) < 1.5 * min(least), (times, least)
    code = (
        "import sys; sys.argv = ['lowres', 'list']\n"
        "from lowres.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checking_a_recipe_imports_no_torch() -> None:
    """Behaviour: problems are shown at once, also on a machine where torch is slow to load."""
    code = (
        "import sys\nfrom lowres.core.reading import load_recipe\n"
        "load_recipe('recipes/cola/minilm-lora-cpu.yaml')\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_listing_as_json_names_every_part() -> None:
    """Behaviour."""
    found = json.loads(lowres("list", "--json").stdout)
    assert "lora" in found["method"] and found["task"]["cola"]
    assert lowres("list", "metods").returncode == 2


def test_showing_a_part() -> None:
    """Behaviour: source, keys, defaults; an unknown one is refused with a suggestion."""
    done = lowres("show", "method", "lora")
    assert "2106.09685" in done.stdout and "rank" in done.stdout and "default 8" in done.stdout
    lr = lowres("show", "optimizer", "adamw").stdout
    assert re.search(r"lr: .*required", lr)
    done = lowres("show", "method", "lorra")
    assert done.returncode == 2 and "did you mean 'lora'" in done.stderr


def test_a_run_from_the_command_line_leaves_everything_and_reports(
    raw_recipe: Callable[..., dict[str, Any]], in_folder: Path
) -> None:
    """Behaviour: plain lines, record, resolved recipe, losses, adapter, card, events, page."""
    keys = raw_recipe("encoder", method="lora", loop={"save_every": 2, "trackers": ["tensorboard"]})
    (in_folder / "r.yaml").write_text(yaml.safe_dump(keys))
    done = lowres("run", "r.yaml", "--set", "optimizer.lr=2e-3", cwd=in_folder)
    assert done.returncode == 0, done.stderr
    assert "update 1/4  loss" in done.stderr and "tokens/s" in done.stderr
    assert "majority" in done.stdout and "live tensors" in done.stdout
    folder = in_folder / "runs" / "r-1"
    there = {p.name for p in folder.iterdir()}
    assert {"record.json", "recipe.yaml", "losses.jsonl", "model", "predictions",
            "report.html", "checkpoint-4"} <= there  # fmt: skip
    assert list(folder.rglob("events.out.tfevents*"))
    saved = {p.name for p in (folder / "model").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "tokenizer.json",
    } <= saved
    record = json.loads((folder / "record.json").read_text())
    assert record["outcome"] == "ok" and record["overrides"] == ["optimizer.lr=2e-3"]
    assert len(record["losses"]) == 4 and len(record["learning_rates"]) == 4
    phases = record["measured"]["phases"]
    assert set(phases) == {"load", "first_step", "steady_steps", "evaluate", "save"}
    for name in ("load", "first_step", "steady_steps", "evaluate"):
        assert phases[name]["live_bytes"] > 0, name
    assert phases["steady_steps"]["live_bytes"] >= phases["load"]["live_bytes"]
    assert record["environment"]["versions"]["torch"]
    assert str(in_folder) not in (folder / "record.json").read_text().replace(
        json.dumps(keys["model"]["checkpoint"])[1:-1], ""
    )
    assert lowres("report", str(folder)).returncode == 0


def test_a_page_that_cannot_be_written_hides_no_run(
    command: Callable[..., Any], raw_recipe: Callable[..., dict[str, Any]], in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Behaviour: the table is there, the reason is told, and the run was a success."""
    from lowres.report import page

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_page", full)
    Path("r.yaml").write_text(yaml.safe_dump(raw_recipe(loop={"steps": 1})))
    done = command("run", "r.yaml", "--no-plan")
    assert done.returncode == 0 and "majority" in done.stdout
    assert "page could not be written" in done.stderr and "No space left" in done.stderr


def test_wrong_input_exits_2_with_one_message(command: Callable[..., Any], in_folder: Path) -> None:
    """Behaviour: no traceback."""
    (in_folder / "bad.yaml").write_text("model: 3\n")
    for name in ("check", "run"):
        done = command(name, "bad.yaml")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "`model` (line 1): is 3; give a mapping of its fields" in done.stderr
    assert not (in_folder / "runs").exists()


@pytest.mark.parametrize(
    ("error", "code", "by"),
    [
        (errors.DoesNotFit("too large"), 3, {"0"}),
        (errors.OutOfMemory("ran out"), 1, {"0", "1"}),
        (KeyboardInterrupt(), 130, {"0", "1"}),
    ],
)
def test_of_several_processes_who_tells_what_went_wrong(
    error: BaseException, code: int, by: set[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Behaviour: the first one alone, but memory may run out in any."""

    def failing() -> None:
        raise error

    monkeypatch.setattr(main, "app", failing)
    monkeypatch.setattr(sys, "argv", ["lowres"])
    told = set()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == code
        told |= {rank} if capsys.readouterr().err.startswith("lowres: ") else set()
    assert told == by


def test_resume_takes_an_optional_value(in_folder: Path) -> None:
    """Closed form: how the words are read."""
    from lowres.cli.main import _read

    (in_folder / "checkpoint-3").mkdir()
    assert _read(["run", "--resume", "r.yaml"]) == ["run", "--resume=latest", "r.yaml"]
    assert _read(["run", "r.yaml", "--resume"])[-1] == "--resume=latest"
    # A value may be longer than a file's name can be.
    words = ["check", "r.yaml", "--set", "objective.pattern=" + "long " * 100]
    assert _read(words) == words
    for value in ("latest", "checkpoint-3"):
        assert _read(["run", "--resume", value]) == ["run", "--resume", value]


def test_a_home_is_found_where_no_shell_has_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: `~` in arguments and after the sign of an option; elsewhere it is a letter."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    told = main._read(["export", "~/run", "--output=~/merged", "--set", "a=~/x", "--set=b=~c"])
    assert told == ["export", "/home/me/run", "--output=/home/me/merged", "--set", "a=~/x",
                    "--set=b=~c"]  # fmt: skip
    monkeypatch.setenv("LOWRES_DATA", "~/data")
    assert str(paths.data_folder()) == "/home/me/data"
    monkeypatch.setenv("LOWRES_DATA", "")
    assert str(paths.data_folder()) == paths.DEFAULT_DATA


def test_what_the_system_refuses_is_one_message(
    command: Callable[..., Any], in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: a folder that may not be entered, say; exit 1."""

    def closed(*given: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied", "/closed/run")

    monkeypatch.setattr(main, "app", closed)
    done = command("report", "/closed/run")
    assert done.returncode == 1 and "Permission denied: '/closed/run'" in done.stderr


def test_resuming_from_a_path_that_is_not_there(
    command: Callable[..., Any], raw_recipe: Callable[..., dict[str, Any]], in_folder: Path
) -> None:
    """Behaviour: told as such, wherever the recipe stands; exit 2."""
    Path("r.yaml").write_text(yaml.safe_dump(raw_recipe()))
    for words in (["r.yaml", "--resume", "no/where"], ["--resume", "no/where", "r.yaml"]):
        done = command("run", *words)
        assert done.returncode == 2
        assert "'no/where'" in done.stderr and "there is no such checkpoint" in done.stderr


def test_a_plan_refuses_options_that_would_go_unheard(command: Callable[..., Any]) -> None:
    """Behaviour: one error each, exit 2, before anything is planned."""
    recipe, model = str(ROOT / "recipes" / "quickstart.yaml"), "package:lowres/assets/tiny_lm"
    for told in (
        [recipe, "--gpu", "t4", "--gpu", "rtx-4090"],
        [recipe, "--device-gib", "8", "--device-gib", "12"],
        ["--model", model, "--gpu", "t4", "--gpu", "rtx-4090", "--exact"],
        ["--model", model, "--gpu", "t4", "--gpu", "rtx-4090", "--task", "gsm8k"],
        [recipe, recipe, "--diff", "--html", "page.html"],
        ["--model", model, "--model", model, "--gpu", "t4", "--device-gib", "8"],
        [recipe, "--gpu", "cpu", "--device-gib", "8"],
    ):
        done = command("plan", *told)
        assert done.returncode == 2, (told, done.stdout, done.stderr)
        said = ("does not go with", "takes one", "of it for one model", "a CPU takes")
        assert any(text in done.stderr for text in said), done.stderr
    done = command("report", ROOT / "benchmarks" / "records", "--planner", "--json")
    assert done.returncode == 2 and "--planner prints a table" in done.stderr
