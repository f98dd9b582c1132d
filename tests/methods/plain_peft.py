"""Takes adapters through their life with PEFT's and transformers' own calls after `import lowres`.

    python plain_peft.py BASE METHODS.json FOLDER

METHODS.json maps a method's name to `settings`, `starts_as_base` and `mergeable`; `trainable`, a
count, says that its adapter lies in FOLDER already, trained, beside the logits to be found. What
held is printed as JSON: for each method its checks, true or what was wrong.
"""

from __future__ import annotations

import lowres  # isort: skip  # the promise is for a process that begins with it

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

IDS = torch.arange(5, 45).view(2, 20)
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0  # the second row is padded on the left
LOGITS = "logits.safetensors"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=MASK).logits
    return found


def aligned(model: Any) -> Any:
    """The model with its tensors copied to where tensors of torch begin. What is mapped from a file
    begins anywhere, and some processors then round a product otherwise in its last bit."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def train(model: Any, steps: int) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained, "nothing is trained"
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def answer(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        input_ids=IDS[:1, :8], attention_mask=MASK[:1, :8], max_new_tokens=4, min_new_tokens=4,
        do_sample=False,
    )  # fmt: skip
    return found


def argmax(model: Any) -> torch.Tensor:
    """The same without a cache and without `generate`."""
    ids = IDS[:1, :8]
    for _ in range(4):
        with torch.no_grad():
            scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        scores[:, model.config.eos_token_id] = float("-inf")
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


class Life:
    """One method's adapter; every check but the first begins from what was saved."""

    def __init__(self, name: str, told: dict[str, Any], base: str, folder: Path) -> None:
        self.told, self.base, self.folder = told, base, folder
        self.keys = {"peft_type": "LOWRES_DELTA", "method": name, "settings": told["settings"]}
        self.plain = logits(self.fresh())
        self.trainable = told.get("trainable", 0)
        self.trained = load_file(folder / LOGITS)["logits"] if self.trainable else self.plain

    def fresh(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base).eval()

    def config(self) -> Any:
        if self.told.get("trainable"):  # which weights are in it is known from the saved one alone
            return peft.PeftConfig.from_pretrained(self.folder, inference_mode=False)
        return peft.get_peft_config(dict(self.keys))

    def loaded(self, **options: Any) -> Any:
        return peft.PeftModel.from_pretrained(self.fresh(), self.folder, **options).eval()

    def trains_and_is_saved(self) -> None:
        model = peft.get_peft_model(self.fresh(), self.config())
        if self.told["starts_as_base"]:
            assert torch.equal(logits(model), self.plain), "it does not start as the base"
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        train(model, 3)
        for name, parameter in model.named_parameters():
            assert name not in frozen or torch.equal(parameter, frozen[name]), f"{name} moved"
        self.trained = logits(model)
        assert torch.isfinite(self.trained).all()
        assert not torch.equal(self.trained, self.plain), "it learned nothing"
        model.save_pretrained(self.folder)
        names = {path.name for path in self.folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names, names
        assert not [name for name in names if name.endswith(".bin")], names

    def loads(self) -> None:
        assert torch.equal(logits(self.loaded()), self.trained)

    def loads_without_memory_for_a_first_value(self) -> None:
        model = aligned(self.loaded(low_cpu_mem_usage=True))
        assert torch.equal(logits(model), self.trained)

    def goes_on_training(self) -> None:
        model = self.loaded(is_trainable=True)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == self.trainable, (count, self.trainable)
        train(model, 2)
        assert not torch.equal(logits(model), self.trained)

    def is_frozen_when_loaded_to_be_used(self) -> None:
        assert not [n for n, p in self.loaded().named_parameters() if p.requires_grad]

    def lives_beside_a_second_one(self) -> None:
        model = self.loaded()
        model.add_adapter("another", self.config())
        assert torch.equal(logits(model), self.trained), "the new one changed the first"
        model.set_adapter("another")
        begun = logits(model)
        assert not torch.equal(begun, self.trained), "the second answers as the first"
        if self.told["starts_as_base"]:
            assert torch.equal(begun, self.plain), "the second does not start as the base"
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == self.trainable, f"trained of the second: {count}, not {self.trainable}"
        train(model, 2)
        second = logits(model)
        assert not torch.equal(second, begun), "the second learned nothing"
        model.set_adapter("default")
        assert torch.equal(logits(model), self.trained), "training the second changed the first"
        with model.disable_adapter():
            assert torch.equal(logits(model), self.plain), "it does not switch off"
        model.set_adapter("another")
        assert torch.equal(logits(model), second), "the second is not what it was"
        model.set_adapter("default")
        model.delete_adapter("another")
        assert torch.equal(logits(model), self.trained), "deleting the second changed the first"
        assert list(model.peft_config) == ["default"]
        assert not [n for n, _ in model.named_parameters() if "another" in n]

    def is_added_beside_a_loaded_one(self) -> None:
        model = peft.get_peft_model(self.fresh(), self.config())
        model.load_adapter(str(self.folder), adapter_name="saved")
        model.set_adapter("saved")
        assert torch.equal(logits(model), self.trained)
        model.delete_adapter("default")
        model.set_adapter("saved")
        assert torch.equal(logits(model), self.trained), "deleting the first changed the second"

    def generates(self) -> None:
        model = self.loaded()
        assert torch.equal(answer(model), argmax(model))

    def is_loaded_by_transformers(self) -> None:
        model = self.fresh()
        model.load_adapter(str(self.folder))
        assert torch.equal(logits(aligned(model)), self.trained)
        assert torch.equal(answer(model), argmax(model))
        model.disable_adapters()
        assert torch.equal(logits(model), self.plain), "it does not switch off"
        model.enable_adapters()
        assert torch.equal(logits(model), self.trained)

    def is_found_by_the_auto_class(self) -> None:
        config = json.loads((self.folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == self.base
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        assert torch.equal(logits(aligned(model)), self.trained)

    def merges_or_says_why_not(self) -> None:
        model = self.loaded()
        if not self.told["mergeable"]:
            try:
                model.merge_and_unload()
            except ValueError as error:
                assert "merge" in str(error), error
                assert torch.equal(logits(self.loaded()), self.trained)
                return
            raise AssertionError("merge_and_unload went through")
        model.merge_adapter()
        assert torch.allclose(logits(model), self.trained, atol=1e-5), "merged answers otherwise"
        model.unmerge_adapter()
        assert torch.allclose(logits(model), self.trained, atol=1e-5), "unmerged answers otherwise"
        merged = self.loaded().merge_and_unload()
        assert type(merged) is type(self.fresh())
        assert set(merged.state_dict()) == set(self.fresh().state_dict())
        assert torch.allclose(logits(merged), self.trained, atol=1e-5), "merged answers otherwise"

    def is_taken_off(self) -> None:
        model = self.loaded().unload()
        assert type(model) is type(self.fresh())
        assert torch.equal(logits(model), self.plain)

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        for name in vars(Life):
            if name in ("fresh", "config", "loaded", "checks") or name.startswith("_"):
                continue
            if name != "trains_and_is_saved" or not self.told.get("trainable"):
                yield name, getattr(self, name)


def lives(name: str, told: dict[str, Any], base: str, folder: Path) -> dict[str, Any]:
    """A method's checks; where it cannot be saved there is nothing to check of the saved."""
    life, found = Life(name, told, base, folder), {}
    for check, call in life.checks():
        torch.manual_seed(0)
        try:
            call()
            found[check] = True
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno} {last.line}"
            found[check] = f"{type(error).__name__}: {error} ({where})"
            if check == "trains_and_is_saved":
                break
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    assert lowres.__version__
    base, methods, folder = sys.argv[1:]
    told = json.loads(Path(methods).read_text(encoding="utf-8"))
    found = {n: lives(n, t, base, Path(folder) / n) for n, t in told.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
