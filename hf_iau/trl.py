"""TRL's `SFTTrainer` that can also forget; needs the extra `hf-iau[trl]`."""

from __future__ import annotations

import copy
import logging
from typing import Any

import datasets
import numpy as np

from hf_iau.data import RowLoss
from hf_iau.data.validation import refuse_trainer
from hf_iau.distributed import is_main_process
from hf_iau.errors import RequestError, UnsupportedModelError
from hf_iau.memory.gathering import choose_row_loss
from hf_iau.trainer.unlearning_trainer import UnlearningTrainer
from hf_iau.unlearn.output import UnlearnOutput
from hf_iau.unlearn.rows import NUMBER_COLUMN
from hf_iau.utils.optional import require

require("trl", "hf_iau.trl")

from trl import SFTTrainer  # noqa: E402  # what is missing is told first

logger = logging.getLogger(__name__)

_ROWS_OF_A_REQUEST = ("held_out_dataset", "retain_dataset", "test_dataset")


class UnlearningSFTTrainer(UnlearningTrainer, SFTTrainer):
    """`trl.SFTTrainer` that can forget rows, by the data set that it was given.

    Row numbers, `forget_dataset=` and ids name rows of the data set as it was given: text, prompt and completion, or
    messages. TRL tokenises them, cuts them to `max_length` and drops those of which nothing to learn is left; dropped
    rows are told and left out of a request, and where rows were cut that is told. Held-out, retained and test rows of a
    request may be given as they are, or tokenised.

    Args:
        *args, **kwargs: as for `trl.SFTTrainer` and `UnlearningTrainer`.

    Raises:
        UnsupportedModelError: packing, padding-free batches, `loss_type="dft"`, or an auxiliary loss of a mixture of
            experts: there a row has no loss of its own.

    Examples:
        ```python
        from trl import SFTConfig
        from hf_iau.trl import UnlearningSFTTrainer

        args = SFTConfig("out", max_length=512)
        trainer = UnlearningSFTTrainer(model, args, train_dataset=chats, eval_dataset=others, peft_config=lora)
        trainer.train()
        result = trainer.unlearn(chats.select([17, 42]))
        ```
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        if given is not None:
            refuse_trainer(given)
        self.cut_row_numbers = np.zeros(0, dtype=np.int64)
        super().__init__(*args, **kwargs)
        if len(self.cut_row_numbers) and is_main_process():
            logger.warning(
                "%d of the training rows are longer than max_length=%d tokens and were cut: the model is trained on "
                "what is left of them, and only that can be forgotten.",
                len(self.cut_row_numbers),
                self._sft_args.max_length,
            )

    @property
    def _sft_args(self) -> Any:
        return self.args

    def _choose_row_loss(self) -> RowLoss:
        if self._given_row_loss is None:
            if getattr(self, "aux_loss_enabled", False):
                raise UnsupportedModelError(
                    "The auxiliary loss of a mixture of experts couples the rows of a batch: set "
                    "SFTConfig(router_aux_loss_coef=0.0)."
                )
        return choose_row_loss(
            row_loss=self._given_row_loss,
            compute_loss_func=self.compute_loss_func,
            label_smoothing_factor=self.args.label_smoothing_factor,
        )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *others: Any, **named: Any) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, args, *others, **named)
        if args.max_length is not None and NUMBER_COLUMN in (getattr(prepared, "column_names", None) or ()):
            full = [
                number
                for number, tokens in zip(prepared[NUMBER_COLUMN], prepared["input_ids"], strict=True)
                if len(tokens) >= args.max_length
            ]
            if full:  # were they longer? Only these are tokenised once more.
                whole_args = copy.copy(args)
                whole_args.max_length, whole_args.shuffle_dataset = None, False
                whole = super()._prepare_dataset(dataset.select(full), processing_class, whole_args, *others, **named)
                longer = [len(tokens) > args.max_length for tokens in whole["input_ids"]]
                self.cut_row_numbers = np.asarray(whole[NUMBER_COLUMN], dtype=np.int64)[longer]
        return prepared

    def unlearn(self, *args: Any, **kwargs: Any) -> UnlearnOutput:
        """As `UnlearningTrainer.unlearn`; rows beside the forget rows may be given as they are, or tokenised."""
        for name in _ROWS_OF_A_REQUEST:
            if kwargs.get(name) is not None:
                kwargs[name] = self._tokenised(kwargs[name], name)
        return super().unlearn(*args, **kwargs)

    def _tokenised(self, rows: Any, argument: str) -> Any:
        if self._skip_prepare_dataset or not isinstance(rows, datasets.Dataset) or "input_ids" in rows.column_names:
            return rows
        processor: Any = self.processing_class
        prepared = super()._prepare_dataset(rows, processor, self._sft_args, False, self._formatting_func, argument)
        if len(prepared) == 0:
            raise RequestError(f"{argument}= has no row with anything to learn within max_length tokens.")
        return prepared


__all__ = ["UnlearningSFTTrainer"]
