"""Methods that train single weights: which ones, what is added, what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import lowres
from lowres.bridges import peft_tuner
from lowres.core import registry
from lowres.core.errors import InputError, LowresError
from lowres.making.build import Built, build, read, sample_of
from lowres.memory.live import LiveBytes
from lowres.methods import _entries
from lowres.methods._sparse import PARTS, SparseDelta
from tests.methods.adapted import adapted, falcon
from tests.methods.adapted import deltas as parts

CHOSEN = {"fish_mask": {"rows": 12}, "sam_choice": {"batches": 3}}


def sparse(o: int, i: int, count: int, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A layer and a delta for it with drawn places and values."""
    torch.manual_seed(0)
    base = nn.Linear(i, o, bias=False, dtype=dtype).requires_grad_(False)
    delta = SparseDelta(base, {"n": count})
    delta.entries.copy_(torch.randperm(o * i)[:count].sort().values)
    delta.values = nn.Parameter(torch.randn(count, dtype=dtype))
    return base, delta


@pytest.mark.parametrize("shape", [(12, 7, 30), (300, 500, 4000), (1000, 300, 7), (5, 5, 25)])
def test_the_sparse_change_equals_that_of_a_dense_matrix(shape: tuple[int, int, int]) -> None:
    """Reference: autograd through the dense S in float64; 1e-12, rounding of a sum in parts."""
    base, delta = sparse(*shape)
    o, i, _ = shape
    x = torch.randn(3, 4, i, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 4, o, dtype=torch.float64)
    ours = delta.change(base(x), x)
    values = delta.values.detach().requires_grad_()
    dense = torch.zeros(o * i, dtype=torch.float64).index_put((delta.entries.long(),), values)
    reference = base(x) + x @ dense.view(o, i).T
    assert torch.allclose(ours, reference, atol=1e-12)
    got = torch.autograd.grad(ours, (x, delta.values), dy)
    wanted = torch.autograd.grad(reference, (x, values), dy)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, wanted, strict=True))
    delta.fold(base, 1)
    assert torch.allclose(base(x), reference, atol=1e-12)
    delta.fold(base, -1)
    assert torch.allclose(base(x) + x @ dense.view(o, i).T, reference, atol=1e-12)


def test_a_fused_projection_is_changed_in_its_own_orientation() -> None:
    """Reference: the same entries of a Linear with the transposed weights."""
    from transformers.pytorch_utils import Conv1D

    base, delta = sparse(6, 4, 9)
    turned: Any = Conv1D(6, 4).double()
    turned.weight.data.copy_(base.weight.T)
    turned.bias.data.zero_()
    x = torch.randn(2, 4, dtype=torch.float64)
    wanted = delta.change(base(x), x)
    assert torch.allclose(delta.change(turned(x), x), wanted)
    delta.fold(turned, 1)
    assert torch.allclose(turned(x), wanted)


def test_nothing_of_weight_size_is_made() -> None:
    """Closed form: two parts of the matrix beside what is as large as activations or entries."""
    size, positions, count = 1024, 4, 2000
    base, delta = sparse(size, size, count, torch.float32)
    x = torch.randn(positions, size, requires_grad=True)
    base(x).sum().backward()
    with LiveBytes("cpu", held=[base.weight]) as counted:
        before = counted.now_bytes
        delta.change(base(x), x).sum().backward()
    parts, activations, entries = 2 * size * size // PARTS, 8 * positions * size, 6 * count
    taken = counted.peak_bytes - before
    assert taken <= 4 * (parts + activations + 2 * entries)
    assert taken < 4 * size * size / 2


def test_it_is_the_forward_pass_of_shira() -> None:
    """Reference: PEFT's SHiRA with the same places and values."""
    from peft import ShiraConfig, get_peft_model

    torch.manual_seed(0)
    rank, layer = 2, nn.Linear(12, 10)
    count = rank * 22

    def mask(base: Any, r: int, **_: Any) -> torch.Tensor:
        chosen = torch.zeros(120)
        chosen[torch.arange(count) * 120 // count] = 1
        return chosen.view(10, 12)

    config = ShiraConfig(r=rank, target_modules=["0"])
    config.mask_fn = mask
    theirs: Any = get_peft_model(nn.Sequential(layer), config)
    values = torch.randn(count)
    with torch.no_grad():
        theirs.base_model.model[0].shira_weight["default"].copy_(values)
    delta = SparseDelta(layer, {"n": count})
    delta.values.data.copy_(values)
    x = torch.randn(5, 12)
    assert torch.allclose(delta.change(theirs.base_model.model[0].base_layer(x), x), theirs(x))


def test_a_model_may_add_to_a_changed_output_in_place() -> None:
    """Reference: gradients of Falcon's own weights at the entries, whose changes start at zero."""
    ids = torch.arange(24).view(2, 12)
    plain = falcon()
    plain(input_ids=ids, labels=ids).loss.backward()
    model = adapted(falcon(), "shira", targets="all-linear")
    model(input_ids=ids, labels=ids).loss.backward()
    found = parts(model)
    assert len(found) == 2 * 4
    for path, delta in found.items():
        wanted = plain.get_submodule(path).weight.grad.flatten()[delta.entries.long()]
        assert torch.allclose(delta.values.grad, wanted, atol=1e-6), path


@pytest.fixture
def make(recipe: Callable[..., Any]) -> Callable[..., Built]:
    def made(method: str, kind: str = "decoder", **changes: Any) -> Built:
        own = {"name": method, **CHOSEN.get(method, {}), **changes.pop("fields", {})}
        return build(recipe(kind, method=own, **{"objective": "label_words"} | changes))

    return made


def by_hand(recipe: Any, batches: int, size: int, power: int) -> tuple[dict[str, Any], Built]:
    """The gradients of batches by autograd on plain weights."""
    one = recipe(method="full", objective="label_words", loop={"micro_batch_size": 4})
    built = build(one)
    sample = sample_of(one, read(one))
    layers = {
        n: m for n, m in built.model.named_modules()
        if isinstance(m, nn.Linear) and n.startswith("model.decoder.layers.")
    }  # fmt: skip
    sums = {n: torch.zeros_like(m.weight) for n, m in layers.items()}
    for batch in sample.batches(batches * size, size=size):
        built.model.zero_grad()
        sample.loss(built.learner, batch).backward()
        for name, layer in layers.items():
            assert layer.weight.grad is not None
            sums[name] += layer.weight.grad**power
    return sums, built


def test_fish_mask_takes_the_entries_of_most_fisher_information(
    recipe: Callable[..., Any], make: Callable[..., Built]
) -> None:
    """Reference: squared gradients of single rows by autograd, all matrices in one order."""
    sums, _ = by_hand(recipe, 12, 1, 2)
    built = make("fish_mask", fields={"share": 0.1})
    count = sum(int(0.1 * s.numel()) for s in sums.values())
    every = torch.cat([s.flatten() for s in sums.values()])
    best = set(every.topk(count).indices.tolist())
    start, wanted = 0, {}
    for name, matrix in sums.items():
        inside = sorted(b - start for b in best if start <= b < start + matrix.numel())
        wanted |= {name: inside} if inside else {}
        start += matrix.numel()
    found = {n: e.tolist() for n, e in peft_tuner.entries_of(built.model).items()}
    assert found == wanted
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    assert trained == count and len({len(e) for e in found.values()}) > 2, "a budget for all"


def test_sam_choice_takes_the_largest_summed_gradients_of_each_matrix(
    recipe: Callable[..., Any], make: Callable[..., Built]
) -> None:
    """Reference: gradients of micro-batches by autograd, added up."""
    sums, _ = by_hand(recipe, 3, 4, 1)
    built = make("sam_choice", fields={"share": 0.1}, loop={"micro_batch_size": 4})
    found = peft_tuner.entries_of(built.model)
    assert found.keys() == sums.keys()
    for name, matrix in sums.items():
        count = int(0.1 * matrix.numel())
        assert found[name].tolist() == sorted(matrix.abs().flatten().topk(count).indices.tolist())


@pytest.mark.parametrize(
    "lever", ["nf4_weights", pytest.param("int8_weights", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", CHOSEN)
def test_the_choice_over_few_bits_is_nearly_that_over_plain_weights(
    method: str, lever: str, recipe: Callable[..., Any]
) -> None:
    """Reference: the choice over plain weights. Behaviour: more than half of it is met, where a
    draw would meet a twentieth."""
    keys: Any = {
        "model": {"checkpoint": "package:lowres/assets/tiny_lm"},
        "method": {"name": method, "share": 0.05, **CHOSEN[method]},
        "task": {"name": "grammaticality", "train_examples": 16, "eval_examples": 4},
        "loop": {"steps": 2},
    }
    plain = peft_tuner.entries_of(build(recipe(**keys)).model)
    one = recipe(levers=[{"name": lever}], **keys)
    packed = peft_tuner.entries_of(build(one).model)
    both = sum(
        len(set(plain[n].tolist()) & set(packed[n].tolist())) for n in plain.keys() & packed.keys()
    )
    assert both > sum(len(e) for e in plain.values()) / 2


def test_the_highest_of_all_matrices_are_exactly_as_many_as_asked() -> None:
    """Closed form: places of the highest, ties filled from the front, no empty matrix."""
    scores = {"a": torch.tensor([1.0, 5, 2, 2]), "b": torch.tensor([0.0, 0]),
              "c": torch.tensor([2.0, 9])}  # fmt: skip
    found = _entries.highest(scores, 3)
    assert {n: e.tolist() for n, e in found.items()} == {"a": [1, 2], "c": [1]}
    assert {n: e.tolist() for n, e in _entries.highest(scores, 8).items()} == {
        "a": [0, 1, 2, 3], "b": [0, 1], "c": [0, 1],
    }  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        "fish_mask",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("sam_choice", "sara", "diff_pruning")),
    ],
)
def test_a_run_that_died_goes_on_with_what_it_had_chosen(
    method: str, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the uninterrupted run, bit for bit, stopped before and after half time. A choice
    by data is read from the checkpoint and not made again."""
    fields = {"share": 0.1, **CHOSEN.get(method, {})}
    one = recipe(
        method={"name": method, **fields}, objective="label_words",
        optimizer={"name": "adamw", "lr": 0.05},
        loop={"steps": 4, "save_every": 1, "keep_checkpoints": 9},
    )  # fmt: skip
    whole = lowres.run(one, output_folder=tmp_path / "whole", quiet=True, plan=False)
    wanted = load_file(tmp_path / "whole" / "model" / "adapter_model.safetensors")
    if method in CHOSEN:
        look = type(one.method).observe

        def only_in_a_plan(self: Any, learner: Any, sample: Any) -> Any:
            assert isinstance(next(learner.base.parameters()), FakeTensor), "it chose again"
            return look(self, learner, sample)

        monkeypatch.setattr(type(one.method), "observe", only_in_a_plan)
    for stop in (1, 3):
        again = tmp_path / f"after-{stop}"
        again.mkdir()
        (tmp_path / "whole" / f"checkpoint-{stop}").rename(again / f"checkpoint-{stop}")
        resumed = lowres.run(one, resume=str(again / f"checkpoint-{stop}"), quiet=True, plan=False)
        assert resumed.losses == whole.losses
        found = load_file(again / "model" / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("method", CHOSEN)
def test_only_trained_blocks_are_chosen_from(method: str, make: Callable[..., Built]) -> None:
    """Behaviour: and nothing below the first of them is looked at."""
    built = make(method, freezing={"name": "prefix", "frozen": 2})
    assert all(n.startswith("model.decoder.layers.2.") for n in peft_tuner.entries_of(built.model))


def test_plain_peft_is_told_where_the_rows_come_from() -> None:
    """Behaviour."""
    from peft import get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(InputError, match=r"lowres\.build"):
        get_peft_model(model, peft_tuner.DeltaConfig(method="fish_mask"))


@pytest.mark.parametrize("method", ["sara", "diff_pruning"])
@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_without_data_any_model_of_transformers_will_do(method: str, name: str) -> None:
    """Closed form: the trainable count; the first outputs are the model's."""
    import transformers
    from peft import get_peft_model

    sizes = {"GPT2": {"n_embd": 8, "n_layer": 2, "n_head": 2},
             "Llama": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
                       "num_attention_heads": 2}}[name]  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=50, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM" if name == "Llama" else "GPT2LMHeadModel")(
        config
    ).eval()
    ids = torch.arange(10).view(1, 10)
    before = model(ids).logits
    linear = [m for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2
              and (".h." in n or ".layers." in n)]  # fmt: skip
    adapted: Any = get_peft_model(
        model, peft_tuner.DeltaConfig(method=method, settings={"share": 0.1})
    )
    assert torch.equal(adapted(ids).logits, before)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    numels = [m.weight.numel() for m in linear]
    assert trained == (
        2 * sum(numels) if method == "diff_pruning" else sum(int(0.1 * n) for n in numels)
    )


def deltas(built: Built) -> list[Any]:
    return [d for m in built.model.modules() if isinstance(m, peft_tuner.DeltaLayer)
            for d in m.deltas("default")]  # fmt: skip


def test_sara_trains_the_smallest_weights_and_settles_those_that_grew(
    make: Callable[..., Built],
) -> None:
    """Reference: a sort of the magnitudes, and numpy's rule for the nuclear norm."""
    built = make("sara", fields={"share": 0.2})
    method: Any = registry.load("method", "sara")(share=0.2, weight=0.5)
    layer = next(m for m in built.model.modules() if isinstance(m, peft_tuner.DeltaLayer))
    (one,) = layer.deltas("default")
    weight = layer.get_base_layer().weight.detach()
    small = weight.abs().flatten().sort().indices[: int(0.2 * weight.numel())]
    assert one.entries.tolist() == sorted(small.tolist())
    with torch.no_grad():
        for delta in deltas(built):
            delta.values[0], delta.values[1:] = 1.0, 1e-9
    before = one.effective().detach().clone()
    method.before_update(built.model, 0, 4)
    (chosen,) = [d for d in deltas(built) if d.penalised]
    matrix = torch.zeros(chosen.shape).flatten()
    owner = next(m for m in built.model.modules() if isinstance(m, peft_tuner.DeltaLayer)
                 and chosen in m.deltas("default"))  # fmt: skip
    whole = owner.get_base_layer().weight.detach().flatten() + 0
    at = chosen.entries.long()
    matrix[at] = whole[at] + chosen.values.detach()
    wanted = torch.linalg.matrix_norm(matrix.view(chosen.shape), "nuc")
    penalty = method.penalty(built.model)
    assert torch.isclose(penalty, 0.5 * wanted)
    penalty.backward()
    assert chosen.values.grad is not None and bool(chosen.values.grad.abs().sum() > 0)
    method.before_update(built.model, 2, 4)
    assert not one.working[0] and bool(one.working[2:].any())
    with torch.no_grad():
        one.values.fill_(7.0)
    assert one.effective()[0] == before[0] and one.effective()[2] == 7.0


def test_sara_remembers_where_it_started_over_a_base_that_was_rounded(
    make: Callable[..., Built], tmp_path: Path
) -> None:
    """Reference: entries and their weights of the base that it was made on; on the rounded one
    others are the smallest."""
    from peft import PeftModel

    built = make("sara", fields={"share": 0.1})
    saved: Any = built.model
    saved.save_pretrained(tmp_path)
    narrow: Any = make("full").model
    for parameter in narrow.parameters():
        parameter.data.mul_(100).round_().div_(100)
    layers = {n: m for n, m in narrow.named_modules() if isinstance(m, nn.Linear)}
    others = 0
    loaded: Any = PeftModel.from_pretrained(narrow, tmp_path)
    for path, layer in saved.named_modules():
        if not isinstance(layer, peft_tuner.DeltaLayer):
            continue
        (ours,), (theirs,) = (m.deltas("default") for m in (layer, loaded.get_submodule(path)))
        assert torch.equal(ours.entries, theirs.entries) and torch.equal(ours.start, theirs.start)
        weight = layers[path.removeprefix("base_model.model.")].weight.detach().flatten()
        smallest = weight.abs().topk(len(ours.entries), largest=False).indices.sort().values
        others += int(not torch.equal(smallest, ours.entries.long()))
    assert others  # else the test would show nothing


def test_sara_is_refused_over_few_bits(recipe: Callable[..., Any]) -> None:
    """Behaviour: with another way."""
    with pytest.raises(InputError, match="few different values"):
        recipe(method="sara", levers=[{"name": "nf4_weights"}], objective="label_words")


def test_gates_of_diff_pruning_are_hard_concrete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed form: `z = clamp(3 sigmoid(logit u + log alpha) - 1.5, 0, 1)` of given draws u, in the
    forward pass and its gradients; without a draw u = 1/2. Of evenly spaced u as many gates are
    open as the penalty expects, to the spacing and the 1e-4 that draws keep from their ends."""
    from lowres.methods._gated import GatedDelta

    o, i, start = 40, 50, -1.25
    torch.manual_seed(0)
    base = nn.Linear(i, o).double()
    delta = GatedDelta(base, {"log_alpha": start, "gate_rate": 10.0}).double().train()
    nn.init.normal_(delta.change_oi)
    drawn = ((torch.randperm(o * i) + 0.5) / (o * i)).view(o, i).double()
    monkeypatch.setattr(torch, "rand_like", lambda like: drawn.clone())
    expected = float(delta.expected_gates().detach()) / (o * i)
    assert expected == pytest.approx(1 / (1 + math.exp(-start)))
    open_ = float((delta.gates() > 0).double().mean())
    assert open_ == pytest.approx(expected, abs=1 / (o * i) + 1e-4)

    nn.init.normal_(delta.shift_oi, std=0.2)
    alpha = torch.exp(start + 10 * delta.shift_oi.detach()).requires_grad_()
    w = delta.change_oi.detach().clone().requires_grad_()
    x = torch.randn(3, i).double()

    def wanted(u: torch.Tensor) -> torch.Tensor:
        odds = u / (1 - u) * alpha
        return base(x) + x @ ((3 * odds / (1 + odds) - 1.5).clamp(0, 1) * w).T

    y = delta.around(base, x)
    torch.testing.assert_close(y, wanted(drawn), atol=1e-10, rtol=0)
    y.square().sum().backward()
    wanted(drawn).square().sum().backward()
    torch.testing.assert_close(delta.change_oi.grad, w.grad, atol=1e-8, rtol=1e-8)
    assert alpha.grad is not None
    # d alpha / d shift = 10 alpha
    torch.testing.assert_close(delta.shift_oi.grad, 10 * alpha * alpha.grad, atol=1e-8, rtol=1e-8)
    assert 0 < int((delta.shift_oi.grad == 0).sum()) < o * i  # clamped gates pass nothing on
    delta.eval()
    usual = wanted(torch.full_like(drawn, 0.5))
    torch.testing.assert_close(delta.around(base, x), usual, atol=1e-10, rtol=0)
    delta.fold(base, 1)
    torch.testing.assert_close(base(x), usual.detach(), atol=1e-10, rtol=0)


def test_diff_pruning_keeps_the_largest_changes_with_open_gates(make: Callable[..., Built]) -> None:
    """Closed form: as many entries as asked of all matrices, gates of exactly 0 and 1, in training
    too; the expected number of gates at the start."""
    built = make("diff_pruning", fields={"share": 0.05})
    method: Any = registry.load("method", "diff_pruning")(share=0.05, penalty_weight=1.0)
    there = deltas(built)
    total = sum(d.change_oi.numel() for d in there)
    open_ = torch.sigmoid(torch.tensor(5.0))  # log(1.5 / 1.5) is 0
    assert torch.isclose(method.penalty(built.model), open_ * total)
    torch.manual_seed(0)
    with torch.no_grad():
        for delta in there:
            delta.change_oi.normal_()
    changes = torch.cat([d.change_oi.detach().flatten() for d in there])
    method.before_update(built.model, 1, 4)
    assert torch.equal(torch.cat([d.change_oi.detach().flatten() for d in there]), changes)
    method.before_update(built.model, 2, 4)
    count = int(0.05 * total)
    kept = torch.cat([d.usual().flatten() for d in there])
    assert kept.count_nonzero() == count
    assert set(kept.nonzero().flatten().tolist()) == set(changes.abs().topk(count).indices.tolist())
    for delta in there:
        delta.train()
        assert torch.equal(delta.gates(), (delta.change_oi != 0).float())
        delta.gates().sum().backward()
        assert delta.shift_oi.grad.count_nonzero() == 0


def test_a_gate_that_the_penalty_alone_pulls_at_closes(make: Callable[..., Built]) -> None:
    """Behaviour, at the recommended rate and the default penalty: changes that stay 0 give gates no
    other gradient. Without a rate of their own they would need a million updates."""
    built = make("diff_pruning")
    method: Any = registry.load("method", "diff_pruning")()
    shifts = [d.shift_oi for d in deltas(built)]
    optimizer = torch.optim.AdamW(shifts, lr=method.learning_rate_hint[0], weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        method.penalty(built.model).backward()
        optimizer.step()
    for delta in deltas(built):
        delta.eval()
        assert float(delta.gates().max()) == 0


@pytest.mark.parametrize("method", ["fish_mask", "sam_choice"])
def test_nothing_is_chosen_without_a_gradient(method: str) -> None:
    """Behaviour: by scores of 0 any places would do."""
    part: Any = registry.load("method", method)(share=0.1)
    with pytest.raises(LowresError, match="no gradient reaches"):
        part.decide({"a": torch.zeros(100), "b": torch.zeros(100)})


def test_diff_pruning_needs_two_updates(make: Callable[..., Built]) -> None:
    """Behaviour: with one it would save all changes."""
    built = make("diff_pruning")
    with pytest.raises(InputError, match="at least two"):
        registry.load("method", "diff_pruning")().before_update(built.model, 0, 1)


def test_diff_pruning_trains_over_few_bits(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Behaviour: its change is beside the packed weights."""
    one = recipe(
        method={"name": "diff_pruning", "share": 0.1}, levers=[{"name": "nf4_weights"}],
        objective="label_words", loop={"steps": 2},
    )  # fmt: skip
    assert lowres.run(one, output_folder=tmp_path / "out", quiet=True, plan=False).outcome == "ok"


def test_gradients_of_a_fused_projection_are_those_of_its_outputs_by_its_inputs() -> None:
    """Reference: autograd on GPT-2's transposed weights, per row."""
    from types import SimpleNamespace

    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    paths = [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
    rows = [torch.randint(50, (1, 6)) for _ in range(3)]
    wanted = {path: torch.zeros_like(model.get_submodule(path).weight) for path in paths}
    for row in rows:
        model.zero_grad()
        model(row, labels=row).loss.backward()
        for path in paths:
            wanted[path] += model.get_submodule(path).weight.grad ** 2
    model.zero_grad()
    learner: Any = SimpleNamespace(base=model)
    sample: Any = SimpleNamespace(loss=lambda _, batch: model(batch["x"], labels=batch["x"]).loss)
    found = _entries.sums(learner, sample, ({"x": row} for row in rows), paths, power=2)
    for path in paths:
        assert torch.allclose(found[path].view(wanted[path].T.shape), wanted[path].T, atol=1e-7)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["fish_mask", "sam_choice", "sara", "diff_pruning"])
def test_a_saved_adapter_loads_without_memory_of_its_own(
    method: str, make: Callable[..., Built], tmp_path: Path
) -> None:
    """Reference: the adapter that was saved, by its logits; plain PEFT, parameters assigned."""
    from peft import PeftModel

    built = make(method, fields={"share": 0.1})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    saved: Any = built.model.eval()
    saved.save_pretrained(tmp_path)
    plain: Any = make("full").model.eval()
    loaded: Any = PeftModel.from_pretrained(plain, tmp_path, low_cpu_mem_usage=True).eval()
    ids = torch.arange(5, 25).view(1, 20)
    assert torch.equal(loaded(ids).logits, saved(ids).logits)
    with saved.disable_adapter():
        assert not torch.equal(loaded(ids).logits, saved(ids).logits)


@pytest.mark.parametrize(
    "method",
    [
        "diff_pruning",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("fish_mask", "sam_choice", "sara")),
    ],
)
def test_recomputing_activations_changes_nothing(
    method: str, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Reference: the run without it, bit for bit; gates are drawn alike in the second forward
    pass. Under autocast, where inputs are wider than outputs."""
    keys: Any = {
        "method": {"name": method, "share": 0.1, **CHOSEN.get(method, {})},
        "objective": "label_words",
        "optimizer": {"name": "adamw", "lr": 0.02},
        "loop": {"steps": 2, "precision": "bf16"},
    }
    plain, again = (
        lowres.run(
            recipe(levers=levers, **keys),
            output_folder=tmp_path / str(len(levers)),
            quiet=True,
            plan=False,
        )
        for levers in ([], [{"name": "gradient_checkpointing"}])
    )
    assert plain.losses == again.losses
