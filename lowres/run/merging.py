"""Fold a trained adapter into the weights of its base, as they are without quantisation.

Over packed weights PEFT merges by unpacking, adding and packing again, which rounds away most of
what was learned. Here the base is loaded again in `model.dtype`, and what comes out is compared
with the adapter beside that base before it is written. That it is the adapter's own base is seen by
`bridges.bases`.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from lowres.bridges import bases, peft, transformers
from lowres.core.errors import InputError, LowresError
from lowres.core.example import Batch, collate
from lowres.core.learner import Learner, LoadRequest
from lowres.core.parts import fold
from lowres.core.paths import stop_if_unwritable
from lowres.core.recipe import Recipe
from lowres.making import build
from lowres.run import checkpoint

TOLERANCE = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
"""Distance of merged logits from unmerged ones, relative to these: what rounding each weight and
each activation of a deep model to the type may do; a wrong merge is off by the adapter's effect."""
ROWS = 4
_ASIDE = ".partial"


@dataclass(frozen=True)
class Merged:
    """What merging did. Distances are norms of a difference of logits over the norm of logits.

    Args:
        folder: Holds the merged model in transformers' format, and its tokenizer.
        dtype: Of its weights.
        distance: Of the merged model from the adapter beside the same base.
        from_trained: From the adapter beside the base as it was trained over, in fewer bits; 0
            where that is the same base.
        effect: How far the adapter moves the base at all; never 0.
    """

    folder: Path
    dtype: str
    distance: float
    from_trained: float
    effect: float


def merge(
    recipe: Recipe, adapter: str | Path, into: str | Path, *, same_base: bool = False
) -> Merged:
    """Write the plain model that a run's adapter makes of its base.

    The models are in memory one after the other, on the CPU; the base takes what its parameters
    take in `model.dtype`.

    Args:
        recipe: Of the run.
        adapter: The folder that the run saved, `<output>/model`.
        into: A folder that is empty or not there.
        same_base: Take the recipe's base for the one that the adapter was trained beside, whatever
            is known of that: the same weights in another place or type.

    Raises:
        InputError: When there is no such adapter, it cannot be merged, or it was trained beside
            another base.
        LowresError: When the adapter has no effect, or the merged model does not answer as the
            unmerged one; nothing is written.
    """
    adapter, into = Path(adapter), Path(into)
    _check(recipe, adapter, into)
    inputs = build.read(recipe)
    # What is merged is a base without the levers, of which some hold its weights in fewer bits.
    plain = build.request_of(recipe, inputs)
    trained = fold(plain, recipe.levers, "on_load")
    rows = inputs.data.train[:ROWS]
    # Padded, however the run laid rows out: the merged model knows no levers.
    batch = collate(rows, inputs.encoder.pad_id)

    over_trained = None
    if trained != plain:
        learner = adapted(recipe, inputs, trained, adapter, same_base)
        # Some adapters beside packed weights work under autocast alone, as they were trained.
        narrow = recipe.loop.precision != "no"
        with torch.autocast(next(learner.base.parameters()).device.type, torch.bfloat16, narrow):
            over_trained = logits_of(learner, batch)
        del learner  # before the next is loaded
    learner = adapted(recipe, inputs, plain, adapter, same_base)
    unmerged = logits_of(learner, batch)
    with peft.disabled(learner.base):
        effect = distance_of(logits_of(learner, batch), unmerged)
    if effect == 0:
        raise LowresError(
            f"the adapter in {adapter} does nothing: with and without it the logits of {len(rows)} "
            f"rows are the same in {plain.dtype}, so it was not loaded, never trained, or trained "
            "by less than that type can hold; nothing was written: look at the run's losses and "
            "events, train on or with a larger optimizer.lr, or merge in a wider model.dtype"
        )
    learner.module = learner.base = recipe.method.merge(learner.base)
    distance = distance_of(logits_of(learner, batch), unmerged)
    limit = TOLERANCE[plain.dtype]
    if not distance <= limit:
        raise LowresError(
            f"the merged model's logits are off by {distance:.2g} (relative) from those of the "
            f"adapter beside its base, more than the {limit:g} that {plain.dtype} may round away; "
            f"nothing was written to {into}: use the adapter as it is, or a wider model.dtype"
        )
    _write(learner, into)
    from_trained = 0.0 if over_trained is None else distance_of(unmerged, over_trained)
    return Merged(into, plain.dtype, distance, from_trained, effect)


def _check(recipe: Recipe, adapter: Path, into: Path) -> None:
    problems = []
    if not recipe.method.mergeable:
        problems.append(f"method '{recipe.method.name}' cannot be merged; use its adapter as it is")
    if not (adapter / "adapter_config.json").is_file():
        problems.append(
            f"'{adapter}' holds no adapter (no adapter_config.json): the run has not ended, or its "
            "method trains the weights themselves, which leaves nothing to merge"
        )
    if into.exists() and (not into.is_dir() or {p.name for p in into.iterdir()} - {_ASIDE}):
        problems.append(f"'{into}' exists and is not empty; name another folder")
    if problems:
        raise InputError("merging", problems)
    stop_if_unwritable(into / "config.json", makes_folders=True)


def _write(learner: Learner, into: Path) -> None:
    """Aside, within the folder, and moved up: a full disk leaves no half of a model there."""
    new = not into.exists()
    aside = into / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)  # of a merge that was killed
    try:
        with checkpoint.writing("the merged model", into, resumable=False):
            aside.mkdir(parents=True)
            transformers.save(learner.base, learner.tokenizer, aside)
            for path in aside.iterdir():
                path.rename(into / path.name)
    except BaseException:
        shutil.rmtree(into if new else aside, ignore_errors=True)
        raise
    aside.rmdir()


def adapted(
    recipe: Recipe,
    inputs: build.Inputs,
    request: LoadRequest,
    adapter: Path,
    same_base: bool = False,
) -> Learner:
    """A base with the adapter beside it, in evaluation mode."""
    # Loading packed weights writes so into the configuration, which the plain base must not read.
    config = copy.deepcopy(inputs.config)
    seed = recipe.loop.seed
    model, fresh = transformers.load_model(request, config, inputs.encoder.pad_id, seed)
    if not same_base:
        bases.stop_at_other(model, request.revision, adapter)
    blocks = build.blocks_of(recipe, inputs, model, fresh)
    model = peft.load_adapter(model, adapter).eval()
    return Learner(model, model, inputs.tokenizer, inputs.kind, inputs.head, blocks)


def logits_of(learner: Learner, batch: Batch) -> torch.Tensor:
    """In float32, with padding left out of what is compared."""
    device = next(learner.base.parameters()).device
    with torch.no_grad():
        logits = learner.logits({k: v.to(device) for k, v in batch.items()}).float().cpu()
    if learner.head in ("causal", "masked"):
        return logits[batch["attention_mask"].bool()]
    return logits


def distance_of(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
