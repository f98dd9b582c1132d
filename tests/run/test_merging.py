"""An adapter that was trained over packed weights, folded into the base as it is in 16 bits."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowres
from lowres.bridges import bases, peft, transformers
from lowres.core.errors import InputError, LowresError
from lowres.making.build import build
from lowres.run import merging

TINY = {"checkpoint": "package:lowres/assets/tiny_lm"}
STRONG = {"name": "lora", "targets": "all-linear", "rank": 4, "alpha": 64}


@pytest.fixture
def trained(recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """A recipe and the folder of the adapter that a run of it saved."""

    def run(**changes: Any) -> tuple[Any, Path]:
        one = recipe(
            **{"model": TINY, "method": STRONG, "objective": "label_words",
               "optimizer": {"name": "adamw", "lr": 5e-3}} | changes
        )  # fmt: skip
        lowres.run(one, output_folder=tmp_path / "run", quiet=True, plan=False)
        return one, tmp_path / "run" / "model"

    return run


@pytest.mark.parametrize(
    "lever, dtype, objective",
    [
        ("nf4_weights", "bfloat16", "label_words"),
        ("nf4_weights", "float32", "classification"),
        ("int8_weights", "float16", "label_words"),
    ],
)
def test_what_was_trained_over_packed_weights_comes_out_as_a_plain_model(
    lever: str, dtype: str, objective: str, trained: Any, tmp_path: Path
) -> None:
    """Reference: transformers loads the folder and gives the logits of the unmerged adapter beside
    the base in the same type, within its rounding; they are near those it was trained beside."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    one, adapter = trained(
        model=TINY | {"dtype": dtype}, levers=[lever], objective=objective
    )  # fmt: skip
    out = merging.merge(one, adapter, tmp_path / "merged")
    assert out.dtype == dtype and out.distance <= merging.TOLERANCE[dtype]
    assert out.effect > 10 * out.distance, "the adapter does nothing: the test could not fail"
    assert out.distance < out.from_trained < 1
    assert out.folder == tmp_path / "merged"

    config = json.loads((out.folder / "config.json").read_text())
    assert "quantization_config" not in config
    tensors = load_file(out.folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    assert not any("lora" in name or "base_layer" in name for name in tensors)
    auto: Any = (
        AutoModelForCausalLM if objective == "label_words" else AutoModelForSequenceClassification
    )
    plain = auto.from_pretrained(out.folder, dtype=torch.float32).eval()
    assert type(plain.config).__name__ == "LlamaConfig"
    built = build(one)
    batch = built.collator(built.train_rows[:4])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        theirs = peft.load_adapter(base_of(one, built), adapter).eval()(**inputs).logits.float()
        ours = plain(**inputs).logits
    if objective == "label_words":
        ours, theirs = (x[batch["attention_mask"].bool()] for x in (ours, theirs))
    assert float((ours - theirs).norm() / theirs.norm()) <= 2 * merging.TOLERANCE[dtype]


def base_of(one: Any, built: Any) -> Any:
    """The checkpoint by transformers alone; its new head comes with the adapter."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from lowres.bridges.transformers import resolve

    auto: Any = AutoModelForCausalLM
    more = {}
    if built.learner.head == "classification":
        auto, more = AutoModelForSequenceClassification, {"num_labels": 2}
    model = auto.from_pretrained(
        resolve(one.model.checkpoint).location, dtype=getattr(torch, one.model.dtype), **more
    )
    model.config.pad_token_id = built.tokenizer.pad_token_id
    return model


def test_over_plain_weights_nothing_is_lost(trained: Any, tmp_path: Path) -> None:
    """Closed form: the base that it was trained beside is the one that it is merged into."""
    one, adapter = trained()
    out = merging.merge(one, adapter, tmp_path / "merged")
    assert out.from_trained == 0 and out.distance < 1e-5 < out.effect


def test_a_wrong_merge_writes_nothing(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the adapter is dropped instead of folded in."""
    one, adapter = trained()
    monkeypatch.setattr(type(one.method), "merge", lambda self, model: model.unload())
    with pytest.raises(LowresError, match="merged model's logits are off"):
        merging.merge(one, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_any_folder_without_files_takes_the_model(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: one that is not there yet, nor its parents; the working folder; a link to one; one
    that a killed merge left a half in."""
    one, adapter = trained()
    here, linked, killed = tmp_path / "here", tmp_path / "linked", tmp_path / "killed"
    for folder in (here, linked, killed / ".partial"):
        folder.mkdir(parents=True)
    (killed / ".partial" / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "link").symlink_to(linked)
    monkeypatch.chdir(here)
    there = {}
    for place in (tmp_path / "a" / "b", Path(), tmp_path / "link", killed):
        merging.merge(one, adapter, place)
        there[place] = {p.name: p.stat().st_size for p in place.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= there[killed].keys()
    assert all(files == there[killed] for files in there.values())
    assert (tmp_path / "link").is_symlink()


def test_a_place_that_cannot_be_written_is_told_at_once(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: before any model is loaded."""
    one, adapter = trained()
    monkeypatch.setattr(transformers, "load_model", None)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file' is no folder; name another"):
        merging.merge(one, adapter, tmp_path / "file" / "merged")


@pytest.mark.parametrize("there", [True, False])
def test_a_disk_that_fills_up_leaves_no_half_of_a_model(
    there: bool, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: whether the empty folder was there or not, it is as it was."""
    one, adapter = trained()
    into = tmp_path / "merged"
    if there:
        into.mkdir()

    def write(model: Any, tokenizer: Any, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers, "save", write)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LowresError, match="the merged model could not be written .*disk is full"):
        merging.merge(one, adapter, into)
    assert sorted(tmp_path.iterdir()) == before
    assert not there or not list(into.iterdir())


def test_an_adapter_without_effect_is_not_merged(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Closed form: LoRA's B is 0 before the first update, and the logits are those of the base."""
    one = recipe(model=TINY, method=STRONG, objective="label_words")
    built = build(one)
    transformers.save(built.model, built.tokenizer, tmp_path / "model")
    with pytest.raises(LowresError, match=r"does nothing: .* 4 rows are the same in float32"):
        merging.merge(one, tmp_path / "model", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_lacks_a_tensor_is_not_merged(trained: Any, tmp_path: Path) -> None:
    """Behaviour: named by the names in the file."""
    one, adapter = trained()
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[5]
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lacks 1 of {len(tensors)} tensors: {name};"):
        merging.merge(one, adapter, tmp_path / "merged")


@pytest.mark.parametrize("lever", ["nf4_weights", "int8_weights"])
def test_merging_into_packed_weights_is_refused(lever: str, recipe: Callable[..., Any]) -> None:
    """Behaviour: PEFT would pack what was learned again."""
    one = recipe(model=TINY, method="lora", levers=[lever])
    with pytest.raises(LowresError, match="not merged into quantised weights"):
        one.method.merge(build(one).model)


def test_what_cannot_be_merged_is_refused_at_once(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: all reasons in one message; nothing is loaded."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(InputError) as refusal:
        merging.merge(recipe(), tmp_path / "none", tmp_path / "full")
    texts = [p.text for p in refusal.value.problems]
    assert len(texts) == 2 and "no adapter" in texts[0] and "not empty" in texts[1]


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., str]:
    """The checkpoint in another folder: with other values in one tensor, or in several files."""
    from lowres.bridges.transformers import resolve

    def copy(name: str, other: str | None = None, shards: bool = False) -> str:
        folder = tmp_path / name
        shutil.copytree(resolve(TINY["checkpoint"]).location, folder)
        tensors = load_file(folder / "model.safetensors")
        if other is not None:
            tensors[other] = tensors[other] * 1.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if shards:
            from transformers import AutoModelForCausalLM

            model: Any = AutoModelForCausalLM.from_pretrained(folder)
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder, max_shard_size="1MB")
            assert len(list(folder.glob("*.safetensors"))) > 1
        return str(folder)

    return copy


def test_an_adapter_of_another_base_is_not_merged(
    trained: Any, copied: Any, tmp_path: Path
) -> None:
    """Behaviour: a base of the same shapes, one tensor of which was trained; refused unless the
    caller knows better. The same weights elsewhere and in other files are the same base."""
    one, adapter = trained()
    name = "model.layers.0.mlp.down_proj.weight"
    other = dataclasses.replace(
        one, model=dataclasses.replace(one.model, checkpoint=copied("other", other=name))
    )
    with pytest.raises(InputError, match=r"trained beside another base than '.*other'.* digest"):
        merging.merge(other, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merging.merge(other, adapter, tmp_path / "merged", same_base=True)
    moved = dataclasses.replace(
        one, model=dataclasses.replace(one.model, checkpoint=copied("moved", shards=True))
    )
    merging.merge(moved, adapter, tmp_path / "again")


def adapter_of(folder: Path, digest: str | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if digest is not None:
        (folder / "base.json").write_text(digest)
    return folder


def loaded(place: str) -> Any:
    return SimpleNamespace(name_or_path=place)


def test_without_a_digest_the_names_of_bases_are_compared(copied: Any, tmp_path: Path) -> None:
    """Behaviour: adapters of plain PEFT; one folder has many names, and some bases have none."""
    base, other = copied("base"), copied("other")
    (tmp_path / "link").symlink_to(base)
    adapter = adapter_of(tmp_path / "a", base_model_name_or_path=base)
    for same in (base, str(tmp_path / "link"), f"{other}/../base", ""):
        bases.stop_at_other(loaded(same), None, adapter)
    for place in (other, "someone/model", str(tmp_path / "gone")):
        with pytest.raises(InputError, match=f"'{base}', .* '{place}'; set model.checkpoint"):
            bases.stop_at_other(loaded(place), None, adapter)
    bases.stop_at_other(loaded(other), None, adapter_of(tmp_path / "a"))


def test_files_of_a_base_of_the_hub_are_found_by_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: found in the cache by the recipe's revision."""
    from huggingface_hub import constants

    local = transformers.resolve(TINY["checkpoint"]).location
    cache = tmp_path / "models--me--tiny"
    shutil.copytree(local, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "v2").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert bases.folder_of("me/tiny", "v2") == str(cache / "snapshots" / ("a" * 40))
    assert bases.folder_of("me/tiny", None) is None and bases.folder_of(local, None) == local


def test_a_named_revision_is_compared(tmp_path: Path) -> None:
    """Behaviour: none is the hub's `main`."""
    named = {"base_model_name_or_path": "someone/model"}
    adapter = adapter_of(tmp_path / "a", **named, revision="main")
    bases.stop_at_other(loaded("someone/model"), None, adapter)
    with pytest.raises(InputError, match="revision 'main' of .* the recipe's is 'v2'"):
        bases.stop_at_other(loaded("someone/model"), "v2", adapter)


def test_a_damaged_digest_is_an_error(copied: Any, tmp_path: Path) -> None:
    """Behaviour: it is not taken for none."""
    adapter = adapter_of(tmp_path / "a", digest="{")
    with pytest.raises(InputError, match="holds no digest"):
        bases.stop_at_other(loaded(copied("base")), None, adapter)
