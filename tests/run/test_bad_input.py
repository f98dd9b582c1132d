"""What a user gets wrong after the recipe has parsed: one message, exit 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowres
from lowres.core.errors import Diverged, InputError, LowresError


def refused(recipe: Any, folder: Path, expected: str) -> None:
    """The run is refused with that text, and its folder is not there afterwards."""
    with pytest.raises(InputError) as caught:
        lowres.run(recipe, output_folder=folder / "out", quiet=True)
    assert expected in str(caught.value), str(caught.value)
    assert caught.value.exit_code == 2
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "checkpoint, expected",
    [
        ("./not/there", "`model.checkpoint`: './not/there': there is no such folder"),
        ("package:no_such_module/model", "no package 'no_such_module' is installed; pip install"),
        ("package:lowres/nowhere", "the package 'lowres' has no folder 'nowhere'"),
        ("nobody/nothing-at-all", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_checkpoint_that_is_not_there(
    checkpoint: str, expected: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: offline, no request is made."""
    refused(recipe(model={"checkpoint": checkpoint}), tmp_path, expected)


def test_a_folder_without_weights(
    recipe: Callable[..., Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Behaviour: config and tokenizer are there, the safetensors are not."""
    shutil.copytree(checkpoints["decoder"], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    refused(recipe(model={"checkpoint": str(tmp_path / "m")}), tmp_path, "it cannot be loaded")


def test_pickled_weights_are_not_read(
    recipe: Callable[..., Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Behaviour: a pytorch_model.bin is no substitute for safetensors."""
    import torch

    shutil.copytree(checkpoints["decoder"], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    refused(
        recipe(model={"checkpoint": str(tmp_path / "m")}),
        tmp_path,
        "No pickle is read",
    )


def tokenizer_without(
    names: dict[str, Any], kind: str, checkpoints: dict[str, Path], maker: Any, folder: Path
) -> str:
    shutil.copytree(checkpoints[kind], folder / "m")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / "m" / file).unlink(missing_ok=True)
    maker(**names).save_pretrained(folder / "m")
    return str(folder / "m")


def test_a_tokenizer_without_padding(
    recipe: Callable[..., Any], checkpoints: Any, tokenizer_maker: Any, tmp_path: Path
) -> None:
    """Behaviour: the message names a token that would do, and with it the run works."""
    where = tokenizer_without(
        {"pad_token": None}, "decoder", checkpoints, tokenizer_maker, tmp_path
    )
    refused(recipe(model={"checkpoint": where}), tmp_path, "set model.pad_token to a token")
    wrong = recipe(model={"checkpoint": where, "pad_token": "<nope>"})
    refused(wrong, tmp_path, "'<nope>' is not in the tokenizer's vocabulary")
    good = recipe(model={"checkpoint": where, "pad_token": "</s>"}, loop={"steps": 1})
    record = lowres.run(good, output_folder=tmp_path / "out", quiet=True)
    assert any("the pad token is the end token" in e.text for e in record.events)


def gsm8k_folder(folder: Path, rows: list[str]) -> str:
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def generating(recipe: Callable[..., Any], folder: str, **loop: Any) -> Any:
    return recipe(
        task={"name": "gsm8k", "folder": folder, "eval_examples": 2},
        objective={"name": "next_token", "max_new_tokens": 4},
        loop={"steps": 1, "max_length": 32} | loop,
    )


def test_answers_that_never_fit(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Behaviour: prompts longer than max_length leave no label in any row."""
    rows = [f'{{"question": "{"very long " * 40}", "answer": "#### {i}"}}' for i in range(8)]
    one = generating(recipe, gsm8k_folder(tmp_path / "d", rows))
    refused(one, tmp_path, "within 32 tokens not one of 8 training rows keeps a label")


def test_answers_that_sometimes_do_not_fit_are_counted(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: left out, counted in the record and said before the first update."""
    rows = [
        f'{{"question": "{"very long " * (40 * (i < 3))}", "answer": "#### {i}"}}' for i in range(8)
    ]
    one = generating(recipe, gsm8k_folder(tmp_path / "d", rows))
    record = lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    train = next(d for d in record.data if d.split == "train")
    assert (train.rows, train.dropped) == (5, 3)
    assert record.events[0].step == 0
    assert "3 of 8 rows keep no label within 32 tokens" in record.events[0].text


def test_broken_rows_are_named_by_line(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Behaviour: each kind of broken row."""
    rows = ['{"question": "a", "answer": "#### 1"}', "{not json", '{"question": "b"}', "[1]"]
    one = generating(recipe, gsm8k_folder(tmp_path / "d", rows))
    with pytest.raises(InputError) as caught:
        lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    text = str(caught.value)
    assert "line 2: it is not JSON" in text
    assert "line 3: it has no answer" in text
    assert "line 4: it is not a JSON object" in text


def test_broken_answers_are_counted_past_the_first_few(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: five are shown, of the others their number."""
    rows = [f'{{"question": "a", "answer": "{i}"}}' for i in range(8)]
    one = generating(recipe, gsm8k_folder(tmp_path / "d", rows))
    refused(one, tmp_path, "row 5: its answer has no number after ####\n  - and 3 more broken")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("in_domain_train.tsv", "text\tlabels\n" + "fine\t1\n" * 7,
         "has 1 problem(s):\n  - it has columns text, labels; wants sentence, label; name"),
        ("in_domain_train.jsonl", '{"sentence": "fine", "target": 1}\n' * 7,
         "has 1 problem(s):\n  - it has keys sentence, target; wants sentence, label; name"),
        ("in_domain_train.tsv", "sentence,label\n" + "fine,1\n" * 7, "separated by tabs"),
    ],
)  # fmt: skip
def test_columns_of_other_names_are_told_once(
    name: str, text: str, expected: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: with what the file has and what it needs, and not row by row."""
    (tmp_path / name).write_text(text)
    refused(recipe(task={"name": "cola", "folder": str(tmp_path)}), tmp_path, expected)


def test_labels_out_of_range_and_ragged_tables(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Behaviour: in the form of the published CoLA files."""
    header = "label\tsentence\n"
    (tmp_path / "in_domain_train.tsv").write_text(header + "1\tfine\n7\todd\n0\tbad\n")
    one = recipe(task={"name": "cola", "folder": str(tmp_path)})
    refused(one, tmp_path, "row 2: its label '7' is none of 0, 1")
    (tmp_path / "in_domain_train.tsv").write_text(header + "1\tfine\n1\ttwo\tmany\n")
    refused(one, tmp_path, "line 3: it has 3 cells, the header 2")
    (tmp_path / "in_domain_train.tsv").write_text(header)
    refused(one, tmp_path, "the split 'train' has no rows")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"task": {"name": "grammaticality", "train_examples": 5990, "hold_out": 20}},
         "ask for 6010 rows, the training split has 6000"),
        ({"task": {"name": "grammaticality", "evaluate": ["dev"]}},
         "no split 'dev'; there are in_domain, out_of_domain"),
        ({"task": {"name": "cola", "folder": "nowhere"}}, "there is no folder 'nowhere'"),
        ({"loop": {"max_length": 100}}, "100 is more than the 64 positions of the model"),
        ({"method": {"name": "lora", "targets": "q_prox"}},
         "no linear layer is named 'q_prox'; there are fc1, fc2, k_proj, out_proj, q_proj, v_proj"),
        ({"freezing": {"name": "prefix", "frozen": 9}}, "9 is more than the 3 blocks of the model"),
        ({"objective": {"name": "label_words", "words": ["no way", "yes"]}},
         "the word 'no way' is 4 tokens"),
    ],
)  # fmt: skip
def test_what_only_the_data_or_the_model_can_tell(
    changes: dict[str, Any], expected: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: the value, the reason, what there is."""
    refused(recipe(**changes), tmp_path, expected)


def test_float16_on_a_cpu(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: accelerate by itself would compute in float32 and say nothing."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    expected = "'fp16' does not work on this device: there is no float16 on a CPU; set"
    refused(recipe(loop={"precision": "fp16"}), tmp_path, expected)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_a_launcher_that_wants_an_engine_of_its_own(
    engine: str, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: what `accelerate launch --config_file` sets; DeepSpeed would stop with a traceback
    and FSDP divide what the recipe leaves whole."""
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "")
    refused(recipe(), tmp_path, "launched with settings of ")


def test_an_output_folder_is_never_overwritten(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Behaviour: what lies there stays as it was."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="exists and is not empty; --output"):
        lowres.run(recipe(), output_folder=tmp_path / "out", quiet=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_without_a_folder_each_run_gets_the_next_number(
    recipe: Callable[..., Any], in_folder: Path
) -> None:
    """Behaviour."""
    one = recipe(loop={"steps": 1})
    for _ in range(2):
        lowres.run(one, quiet=True)
    names = sorted(p.name for p in (in_folder / "runs").iterdir())
    assert names == ["grammaticality-full-1", "grammaticality-full-2"]


def test_an_unwritable_folder_is_one_message(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Behaviour: a file stands where the folder's parent should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        lowres.run(recipe(), output_folder=tmp_path / "file" / "out", quiet=True)


def test_a_full_disk_keeps_earlier_checkpoints_whole(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the third checkpoint meets a full disk; the second one resumes."""
    import errno

    from lowres.run import checkpoint

    one = recipe(loop={"steps": 5, "save_every": 1})
    plain, calls = Path.write_text, []

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == "progress.json":
            calls.append(self)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(LowresError, match="the disk is full"):
        lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    monkeypatch.undo()
    left = [p.name for p in checkpoint.checkpoints(tmp_path / "out")]
    assert left == ["checkpoint-1", "checkpoint-2"]
    assert not list((tmp_path / "out").glob("*.partial"))
    assert json.loads((tmp_path / "out" / "record.json").read_text())["outcome"] == "failed"
    resumed = lowres.run(one, output_folder=tmp_path / "out", resume="latest", quiet=True)
    whole = lowres.run(one, output_folder=tmp_path / "whole", quiet=True)
    assert resumed.losses == whole.losses


def test_resuming_what_is_not_there(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Behaviour."""
    with pytest.raises(InputError, match="holds no checkpoint to resume from"):
        lowres.run(recipe(), output_folder=tmp_path / "out", resume="latest", quiet=True)
    with pytest.raises(InputError, match="there is no such checkpoint"):
        lowres.run(recipe(), resume=str(tmp_path / "checkpoint-3"), quiet=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(InputError, match="is no checkpoint of lowres"):
        lowres.run(recipe(), resume=str(tmp_path / "checkpoint-3"), quiet=True)


def test_resuming_names_an_earlier_run_that_has_checkpoints(
    recipe: Callable[..., Any], in_folder: Path
) -> None:
    """Behaviour: it is not gone on with unasked, but named, the latest checkpoint of all."""
    for run in (2, 9, 10):
        (in_folder / "runs" / f"grammaticality-full-{run}").mkdir(parents=True)
    for made in ("2/checkpoint-5", "9/checkpoint-3", "9/checkpoint-12"):
        (in_folder / "runs" / f"grammaticality-full-{made}").mkdir()
    with pytest.raises(InputError, match="(?s)full-10.*holds no .*--resume .*9.checkpoint-12`"):
        lowres.run(recipe(), resume="latest", quiet=True)
    (in_folder / "runs" / "grammaticality-full-10").rmdir()
    with pytest.raises(InputError, match="(?s)full-9.checkpoint-12.*is no checkpoint of lowres"):
        lowres.run(recipe(), resume="latest", quiet=True)


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: outcome `diverged`, in a record that reads back."""
    from lowres.core import record as record_module

    wild = recipe(
        optimizer={"name": "adamw", "lr": 1e18}, loop={"steps": 20, "max_grad_norm": None}
    )
    with pytest.raises(Diverged, match=r"lower optimizer.lr \(now 1e\+18\)"):
        lowres.run(wild, output_folder=tmp_path / "out", quiet=True)
    record = record_module.from_file(tmp_path / "out" / "record.json")
    assert record.outcome == "diverged" and record.error


def test_weights_that_are_missing_are_not_made_up(
    recipe: Callable[..., Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Behaviour: a block that the checkpoint does not hold is no new head."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoints["decoder"], tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if "layers.1." not in k}
    save_file(kept, file, metadata={"format": "pt"})
    one = recipe(model={"checkpoint": str(tmp_path / "m")}, objective="label_words")
    refused(one, tmp_path, "it holds no weights for model.decoder.layers.1.")


def test_problems_of_checkpoint_and_data_come_together_with_their_lines(
    raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Behaviour: what is independent is not told one at a time."""
    import yaml

    keys = raw_recipe(model={"checkpoint": "./nowhere"}, task={"name": "cola", "folder": "gone"})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    with pytest.raises(InputError) as caught:
        lowres.run(
            lowres.load_recipe(tmp_path / "r.yaml"), output_folder=tmp_path / "o", quiet=True
        )
    text = str(caught.value)
    assert "r.yaml has 2 problem(s)" in text
    assert "`model.checkpoint` (line 2): './nowhere'" in text
    assert "there is no folder 'gone'" in text


def test_a_finished_run_is_not_resumed_over_its_record(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: the record stays as it was."""
    one = recipe(loop={"steps": 2, "save_every": 1})
    lowres.run(one, output_folder=tmp_path / "out", quiet=True)
    before = (tmp_path / "out" / "record.json").read_text()
    with pytest.raises(InputError, match="the run is finished"):
        lowres.run(one, output_folder=tmp_path / "out", resume="latest", quiet=True)
    assert (tmp_path / "out" / "record.json").read_text() == before


def test_a_mapping_is_not_changed_by_reading_it(raw_recipe: Callable[..., Any]) -> None:
    """Behaviour: overrides of one recipe do not leak into the next."""
    keys = raw_recipe()
    before = json.dumps(keys)
    lowres.load_recipe(keys, ["optimizer.lr=0.5"])
    assert json.dumps(keys) == before


def test_errors_travel_between_processes() -> None:
    """Behaviour: as accelerate's broadcast sends them."""
    import pickle

    error = InputError("'x'", ["one", "two"])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert str(again) == str(error) and again.exit_code == 2
