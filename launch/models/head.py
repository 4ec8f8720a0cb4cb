"""A new head on a base: what transformers' AutoModelForSequenceClassification puts on it.

What is new are the parameters that the base's files lack, all of them trained whole:

    BERT, ELECTRA...     classifier; the pooler before it too, where the files lack it
    RoBERTa              classifier.dense and classifier.out_proj; it uses no pooler
    DeBERTa-v2, -v3      pooler.dense and classifier
    Llama, Qwen...       score, without a bias, on the last token that is no padding
"""

from collections.abc import Collection
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from astra.targets import POOLER, is_of_pooler
from launch.runtime.errors import UserError

# The first parts of names, below the base's own prefix, of what files hold for other heads.
OTHER_HEADS = {
    "cls",
    "lm_head",
    "lm_predictions",
    "mask_predictions",
    "discriminator_predictions",
    "generator_predictions",
    "generator_lm_head",
    "vocab_transform",
    "vocab_layer_norm",
    "vocab_projector",
    "predictions",
    "sop_classifier",
    "decoder",
    POOLER,
}


@dataclass(frozen=True)
class Head:
    """What decides a new head, beside the base."""

    labels: tuple[str, ...]  # by output; empty for a regression
    pad_token: int  # id of the token that fills up rows

    def fill_config(self, config: PretrainedConfig) -> None:
        """Set the fields of a base's config by which transformers makes the model with this head.

        `problem_type` tells such a config from a causal language model's.
        """
        names = self.labels or ("value",)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        config.problem_type = "single_label_classification" if self.labels else "regression"
        if not is_encoder(config):
            # A decoder's head looks for it. An encoder's config decides where positions begin.
            config.pad_token_id = config.get_text_config().pad_token_id = self.pad_token
        config.use_cache = config.get_text_config().use_cache = False


def set_head(config: PretrainedConfig, head: Head | None) -> None:
    """Let transformers make a causal language model of `config`, or one with a new `head`.

    A head that config.json was written for is forgotten.
    """
    config.problem_type = None
    if head is not None:
        head.fill_config(config)


def is_encoder(config: PretrainedConfig) -> bool:
    """Return whether a model's tokens attend to later ones too, as BERT's do."""
    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        return False
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def find_padding(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """Return the id of the token that pads rows.

    A decoder without one is padded with the end of sequence. Its attention does not see the padding,
    and its head takes the last other token.

    Raises:
        UserError: an encoder's tokenizer has none, or a decoder's has no end of sequence either; or it
            has no row in the embedding.
    """
    if tokenizer.pad_token_id is not None:
        num_rows = getattr(config.get_text_config(), "vocab_size", None)
        if num_rows is not None and tokenizer.pad_token_id >= num_rows:
            raise UserError(
                f"model.name: the tokenizer's padding token {tokenizer.pad_token!r} is token "
                f"{tokenizer.pad_token_id}, and the embedding has {num_rows} rows; remove it from the "
                "tokenizer, or enlarge the base with resize_token_embeddings and save it"
            )
        return tokenizer.pad_token_id
    if is_encoder(config) or tokenizer.eos_token_id is None:
        raise UserError(
            "model.name: the tokenizer has no padding token, which rows of several lengths need; "
            "set pad_token in its files"
        )
    return tokenizer.eos_token_id


def find_head_names(model: PreTrainedModel, missing: Collection[str]) -> tuple[str, ...]:
    """Return which of the parameters that the files lack are the new head's, in the model's order.

    They are those outside of the base, and those of a pooler.
    """
    outer, names = find_outer_names(model), []
    for name, _ in model.named_parameters():
        if name in missing and (name in outer or is_of_pooler(name)):
            names.append(name)
    return tuple(names)


def find_outer_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the parameters outside of the base, all of which are a new head's, in their order."""
    prefix = f"{model.base_model_prefix}."
    return tuple(name for name, _ in model.named_parameters() if not name.startswith(prefix))


def is_of_other_head(name: str, model: PreTrainedModel) -> bool:
    """Return whether a tensor in the files is another head's, or a pooler's, which is not used."""
    return name.removeprefix(f"{model.base_model_prefix}.").split(".")[0] in OTHER_HEADS
