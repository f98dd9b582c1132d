"""PEFT's soft prompts: trained vectors before the embeddings of a row.

PEFT gives the logits of the vectors' places, too; `core.learner.Learner` leaves them out, so that
adapters loaded by PEFT alone are asked alike. Legend: P vectors, B rows, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
)
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lowres.bridges import quiet
from lowres.core.errors import InputError, Problem
from lowres.core.example import IGNORED
from lowres.core.learner import forward_arguments

if TYPE_CHECKING:
    from lowres.core.blocks import Blocks


class _Prompted(PeftModel):
    """What PEFT 0.21 leaves out: switching off where a model does not generate, and of the head;
    vectors that are the same with autocast and when they are saved; and no warning that positions
    made without the prompt are put aside."""

    _adapters_disabled: bool

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        heads = [m for m in self.base_model.modules() if isinstance(m, ModulesToSaveWrapper)]
        working = [head for head in heads if not head.disable_adapters]
        before, self._adapters_disabled = self._adapters_disabled, True
        for head in working:
            head.enable_adapters(False)
        try:
            yield
        finally:
            self._adapters_disabled = before
            for head in working:
                head.enable_adapters(True)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self._adapters_disabled:
            return self.base_model(input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is None:
            return super().forward(input_ids, **kwargs)
        length = self.active_peft_config.num_virtual_tokens
        mask = nn.functional.pad(attention_mask, (length, 0), value=1)
        ours = {"attention_mask": mask, **self._positions(mask, length)}

        def put(_: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**given, **ours}

        # PEFT makes a mask of floats, into which a plan, where only integers are real, cannot look.
        hook = self.base_model.register_forward_pre_hook(put, with_kwargs=True)
        try:
            return super().forward(input_ids, attention_mask, **kwargs)
        finally:
            hook.remove()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        call = self.base_model.generate if self._adapters_disabled else super().generate
        return call(*args, **kwargs)

    def get_prompt(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._as_it_is():
            made: torch.Tensor = super().get_prompt(*args, **kwargs)
        return made

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        with self._as_it_is():
            saved: torch.Tensor = super().get_prompt_embedding_to_save(adapter_name)
        return saved

    def _as_it_is(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.word_embeddings.weight.device.type, enabled=False)

    def _positions(self, mask: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """Without gaps: padding behind the first `length` columns and before a row takes none."""
        if _kind_of(self.base_model) != "decoder" or "position_ids" not in forward_arguments(self):
            return {}
        gaps = (mask[:, length:].cumsum(-1) == 0).sum(-1, keepdim=True)
        if not gaps.any():
            return {}
        columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        return {"position_ids": torch.where(columns < length, columns, (columns - gaps).relu())}

    def _adjust_prompt_learning_kwargs(self, peft_config: Any, *, kwargs: Any, **how: Any) -> None:
        kwargs.pop("position_ids", None)
        super()._adjust_prompt_learning_kwargs(peft_config, kwargs=kwargs, **how)


class PromptedCausalLM(_Prompted, PeftModelForCausalLM):
    """A decoder. Rows that are padded on the left are continued with padding before the prompt and
    not between the two, where layers that hand on a state would pass it."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        mask = made.get("attention_mask")
        if mask is None or mask.dim() != 2:
            return made
        order = mask.long().argsort(dim=-1, stable=True)
        mask = made["attention_mask"] = mask.gather(1, order)
        embeds = made.get("inputs_embeds")
        if embeds is not None:
            made["inputs_embeds"] = embeds.gather(1, order[..., None].expand_as(embeds))
        given = made["input_ids"] if embeds is None else embeds
        for name, positions in self._positions(mask, 0).items():
            made[name] = positions[:, -given.shape[1] :]
        return made


class PromptedSeq2SeqLM(_Prompted, PeftModelForSeq2SeqLM):
    """An encoder-decoder, with the prompt before the encoder's input."""


class PromptedClassifier(_Prompted, PeftModelForSequenceClassification):
    """An encoder with a head over its first column, which is then the prompt's first vector; or a
    decoder, read at the last token that is no padding.

    A decoder looks for that token among the ids of a row, which PEFT does not hand on: loaded by
    PEFT alone it is read at the last column, so that rows of a batch want equal lengths.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self._adapters_disabled or _kind_of(self.base_model) != "decoder" or input_ids is None:
            return super().forward(input_ids, attention_mask, **kwargs)
        prompts_BPD = self.get_prompt(batch_size=input_ids.shape[0])
        length = prompts_BPD.shape[1]
        padding = self.base_model.config.get_text_config().pad_token_id
        some_token = 1 if padding == 0 else 0

        def put(_: nn.Module, __: Any, embedded: torch.Tensor) -> torch.Tensor:
            return torch.cat([prompts_BPD.to(embedded.dtype), embedded[:, length:]], 1)

        kwargs.pop("position_ids", None)
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (length, 0), value=1)
            kwargs |= self._positions(attention_mask, length)
        ids = nn.functional.pad(input_ids, (length, 0), value=some_token)
        hook = self.word_embeddings.register_forward_hook(put)
        try:
            return self.base_model(ids, attention_mask=attention_mask, **kwargs)
        finally:
            hook.remove()


class PromptedMaskedLM(_Prompted, PeftModelForFeatureExtraction):
    """A masked encoder, for which PEFT has no class of its own."""

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is not None:
            length = self.active_peft_config.num_virtual_tokens
            kwargs["labels"] = nn.functional.pad(labels, (length, 0), value=IGNORED)
        return super().forward(*args, **kwargs)


_CLASSES: dict[str, type[PeftModel]] = {
    "CAUSAL_LM": PromptedCausalLM,
    "SEQ_2_SEQ_LM": PromptedSeq2SeqLM,
    "SEQ_CLS": PromptedClassifier,
    "FEATURE_EXTRACTION": PromptedMaskedLM,
}


def inject(model: nn.Module, blocks: Blocks, config: str, length: int, **fields: Any) -> nn.Module:
    """Put a soft prompt before the model's input; returns the PeftModel.

    Args:
        config: The name of PEFT's configuration class.
        length: P.
        fields: Of the configuration.

    Raises:
        InputError: When the model or the freezing has no place for it.
    """
    import peft

    _stop_unless_served(model, blocks)
    inner: Any = model
    embeddings = inner.get_input_embeddings()
    task = _task_of(model)
    made = getattr(peft, config)(
        task_type=task,
        base_model_name_or_path=vars(model).get("name_or_path") or None,
        num_virtual_tokens=length,
        token_dim=embeddings.weight.shape[1],
        # Of an encoder-decoder PEFT would else make a second prompt that is never used.
        num_transformer_submodules=1,
        # Which it asks for and does not use here; not every configuration has the usual names.
        num_attention_heads=inner.config.get_text_config().num_attention_heads,
        num_layers=inner.config.get_text_config().num_hidden_layers,
        modules_to_save=list(blocks.head) or None,
        **fields,
    )
    with quiet.peft():
        adapted = _CLASSES[task](model, made)
    taken: Any = adapted.word_embeddings
    # T5's encoder has a module of its own over the shared weight.
    if taken is None or taken.weight is not embeddings.weight:
        raise _refusal(
            f"PEFT takes other embeddings of {type(model).__name__} for those of its input; use "
            "prefix_tuning or lora"
        )
    return adapted


def load(model: nn.Module, folder: Path) -> PeftModel | None:
    """The model with a saved prompt before it, frozen; None for an adapter of another kind."""
    config = PeftConfig.from_pretrained(str(folder))
    task = config.task_type
    if config.peft_type not in ("PROMPT_TUNING", "P_TUNING") or task not in _CLASSES:
        return None
    cls = _CLASSES[task]
    # PEFT asks the type of the task before the class it is called by.
    config.task_type = None
    with quiet.peft():
        loaded: PeftModel = cls.from_pretrained(model, str(folder), config=config)
    config.task_type = task  # saved again it is to be known again
    return loaded


def _task_of(model: nn.Module) -> str:
    from lowres.bridges.peft import task_type

    return task_type(model) or "FEATURE_EXTRACTION"


def _stop_unless_served(model: nn.Module, blocks: Blocks) -> None:
    if not blocks.train_stem or blocks.names[0] not in blocks.trained:
        raise _refusal(
            "its vectors stand where the embeddings are, so backward goes through all blocks down "
            "to the input; use freezing 'none' or 'suffix', or a method that trains within blocks "
            "(lora, prefix_tuning)",
            where="freezing",
        )
    name = type(model).__name__
    get: Any = getattr(model, "get_input_embeddings", lambda: None)
    if not isinstance(get(), nn.Embedding) or "inputs_embeds" not in forward_arguments(model):
        raise _refusal(f"{name} takes no embeddings of tokens in their place; use lora")
    config: Any = model.config
    text = config.get_text_config()
    if getattr(text, "num_attention_heads", None) is None:
        raise _refusal(f"{name} has no attention, and PEFT would put it before each word; use lora")
    if getattr(text, "hidden_size_per_layer_input", 0):
        raise _refusal(f"{name} embeds tokens for every block, which vectors have not; use lora")
    # An embedding that scales is asked; a model that scales does so with ids alone.
    scales = (m for m in model.modules() if not isinstance(m, nn.Embedding))
    if any(getattr(m, "embed_scale", 1.0) != 1.0 for m in scales):
        raise _refusal(
            f"{name} scales the embeddings of ids and not those that are given; use lora"
        )
    if _task_of(model) == "SEQ_CLS" and _kind_of(model) == "encoder_decoder":
        raise _refusal(
            f"{name} makes its decoder's input of the ids of a row, and vectors have none; use the "
            "objective label_words, or prefix_tuning"
        )


def _kind_of(model: Any) -> str:
    from lowres.bridges.kinds import kind_of

    return kind_of(model.config)


def _refusal(why: str, where: str = "method") -> InputError:
    return InputError("the recipe", [Problem(where, f"a soft prompt: {why}")])
