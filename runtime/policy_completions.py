"""How GRPO's completions are made and judged: by the engine where it can, by ``generate`` where it says why not.

Prompts, tools, templates and reward functions go the way that TRL sends them; overridden are single turns, and what is
checked before and after.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..compiler.options import Options
from .generation.batch import Completion
from .generation.engine import complete
from .generation.sampling import sampling_of
from .generation.support import Unsupported
from .images import ImageRules
from .policy_batch import media_by_prompt
from .prompt_images import open_rows, refuse_images, row_of
from .prompts import refuse_too_long
from .rewards import check_judged

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from .sturdy import Sturdy

    class _Base(Sturdy, GRPOTrainer): ...
else:
    _Base = object

logger = logging.getLogger(__name__)


class Completions(_Base):
    """Mixin before :class:`~unsloth.runtime.sturdy.Sturdy` and TRL's ``GRPOTrainer``.

    Attributes:
        options: of the backend.
        reward_errors: see :class:`~unsloth.runtime.grpo.GRPOTrainer`.
    """

    model: Any
    options: Options
    reward_errors: str
    _is_vlm: bool
    _compiles: bool
    _context: int | None  # tokens that prompt and completion share
    _rules: ImageRules
    _left_to: str | None = None  # who makes completions instead of the engine, or why
    _images_left_to: str | None = None  # the same of prompts with images
    _asks_for_completions = False

    def _engine_instead(self, fast_rollouts: bool) -> str | None:
        """Who makes completions instead of us, or None."""
        if not fast_rollouts:
            return "generate"
        if self.use_vllm or getattr(self, "use_transformers_continuous_batching", False):
            return "the engine that the settings name"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "generate, which gathers weights that are spread over processes"
        return None

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self._is_vlm:
            inputs = open_rows(inputs, self._rules, self._name_of)
        else:
            refuse_images(inputs, self.model, self.processing_class)
        return super()._generate_and_score_completions(inputs)

    def _name_of(self, row: Mapping[str, Any]) -> str | None:
        """A row of the data as messages call it; None of a stream."""
        training = self.model.training
        index = row_of(self.train_dataset if training else self.eval_dataset, row)
        name = self.row_name if training else self._name_to_evaluate
        return None if index is None else name(index)

    @staticmethod
    def _name_to_evaluate(index: int) -> str:
        return f"row {index} of the evaluation data"

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        ids, images, media = super()._tokenize_prompts(prompts)
        if images and not self.use_vllm:  # processors take no None among the lists
            images = [theirs or [] for theirs in images]
        if self._asks_for_completions and self._context is not None:
            for index, tokens in enumerate(ids):
                refuse_too_long(
                    len(tokens), self._context, f"prompt {index} of the batch, {str(prompts[index])[:80]!r}"
                )
        return ids, images, media

    def _generate(self, prompts: list[Any]) -> Any:
        self._asks_for_completions = True
        try:
            return super()._generate(prompts)
        finally:
            self._asks_for_completions = False

    # -- completions ---------------------------------------------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, *others: Any, **more: Any
    ) -> Any:
        """As TRL's: completions and the log-probability of each of their tokens, here with the weights as they are."""
        args = prompt_ids, images, multimodal_fields, num_generations, *others
        if self._left_to is None and not (images and self._images_left_to):
            try:
                media = media_by_prompt(multimodal_fields, images or [None] * len(prompt_ids))
                made = self._complete(prompt_ids, media)
                return [c.ids for c in made], [c.log_p for c in made]
            except Unsupported as reason:
                what = "completions of prompts with images" if images else "completions"
                logger.warning("%s are made by generate of transformers, because %s", what, reason)
                if images:
                    self._images_left_to = str(reason)
                else:
                    self._left_to = str(reason)
        return super()._generate_single_turn(*args, **more)

    def _complete(self, prompt_ids: Any, media: list[dict[str, Tensor]]) -> list[Completion]:
        model = self.accelerator.unwrap_model(self.model)
        sampling = sampling_of(self.generation_config, model, max(map(len, prompt_ids)))
        device = self.accelerator.device
        media = [{name: value.to(device) for name, value in theirs.items()} for theirs in media]
        with self.accelerator.autocast():
            return complete(
                model, prompt_ids, sampling, media=media, tokenizer=self._tokenizer,
                compile=None if self._compiles else False, options=self.options,
            )  # fmt: skip

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(prompts)
        judged = (~rewards[first : first + len(prompts)].isnan().all(dim=1)).tolist()
        check_judged(
            self.reward_func_names, judged, {"prompts": prompts, "completions": completions}, self.reward_errors
        )
        return rewards
