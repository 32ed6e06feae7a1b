"""The layers of a checkpoint that predict further tokens (MTP), on this machine.

DeepSeek-V3's and GLM-4.5's checkpoints have one behind their blocks. It is given the last hidden state of a token and
the embedding of the token that follows, and says what comes behind that one. Embeddings and output head are the
client's own. Transformers has the layers (`MtpModel`); servers have nothing to do with them.
"""

# N tokens, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import MtpCache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_layers import MtpModel
from transformers.modeling_utils import LoadStateDictConfig

from shoal.client.generation.drafting.guess_time import GuessTime
from shoal.errors import UnsupportedOperation
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.completeness import check_loaded

OF_THE_MODEL = "embed_tokens.", "shared_head.", "rotary_emb."
"""What the layers share with the model, which has it already."""


class MtpLayers:
    """The layers that guess for one distributed model, whose ends they use. All texts share them."""

    def __init__(self, layers: Any) -> None:
        self._layers = layers
        self.time = GuessTime(self._warm_up)

    @classmethod
    def open(cls, model: Any, checkpoint: Checkpoint) -> MtpLayers:
        """Read the layers of a model from its checkpoint, in the model's dtype and to its device.

        Raises `UnsupportedOperation` if it has none, or none that Transformers knows, and `CheckpointError` if tensors
        are missing.
        """
        tensors = checkpoint.prediction_tensors()
        config = model.config.get_text_config(decoder=True)
        num_layers = getattr(config, "num_mtp_layers", None) or 0
        if not tensors or not num_layers:
            raise UnsupportedOperation(
                f"{checkpoint.name} has no layers that predict further tokens, or none that Transformers knows",
                hint="use another draft: a small model of the same family, or auto",
            )
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedOperation(
                f"the layers of {checkpoint.name} that predict further tokens are quantized",
                hint="use a checkpoint in bfloat16, or another draft",
            )
        return cls(_loaded(model, num_layers, tensors))

    @property
    def num_layers(self) -> int:
        """How many layers there are, each of which predicts one token further than the one before it."""
        return len(self._layers.layers)

    def new_cache(self) -> MtpCache:
        """The cache of one text."""
        cache = MtpCache(config=self._layers.config)
        cache.activate_past_recording()  # layers with a window keep what guesses push out of it
        return cache

    @torch.no_grad()
    def run(self, depth: int, tokens: Sequence[int], states_ND: Tensor, position: int, cache: MtpCache) -> Tensor:
        """Run a layer on tokens that stand at `position` and behind it; returns its hidden states [N, D].

        `states_ND` are those of the tokens before each: the model's for the first layer, or those of the layer before.
        """
        device = states_ND.device
        found_1ND: Tensor = self._layers.forward_layer(
            depth,
            states_ND[None],
            torch.arange(position, position + len(tokens), device=device)[None],
            cache,
            input_ids=torch.tensor([tokens], device=device),
        )
        return found_1ND[0]

    @torch.no_grad()
    def likeliest(self, state_1D: Tensor) -> int:
        """The likeliest token by a hidden state that a layer returned."""
        config = self._layers.config
        num_words = getattr(config, "unpadded_vocab_size", None) or config.vocab_size
        return int(self._layers.shared_head(state_1D)[0, :num_words].argmax())

    def _warm_up(self) -> None:
        weight = self._layers.embed_tokens.weight
        states_1D = torch.zeros(1, self._layers.config.hidden_size, dtype=weight.dtype, device=weight.device)
        self.likeliest(self.run(0, [0], states_1D, 1, self.new_cache()))


def _loaded(model: Any, num_layers: int, tensors: dict[str, Tensor]) -> MtpModel:
    """Transformers' model of these layers, with the ends of the distributed one."""
    ends: Any = SimpleNamespace(
        config=model.config,
        _weight_conversions=get_model_conversion_mapping(model),  # where Transformers looks for the family's
        lm_head=model.get_output_embeddings(),
        get_input_embeddings=model.get_input_embeddings,
        get_decoder=lambda: SimpleNamespace(
            layers=model.meta_layers, rotary_emb=getattr(model.backbone, "rotary_emb", None)
        ),
    )
    try:
        with ExitStack() as contexts:
            for context in MtpModel.get_init_context(model.dtype, False, False, None):
                contexts.enter_context(context)
            layers = MtpModel(ends, num_layers)
    except (ValueError, AttributeError) as error:  # a config that says too little of its layers
        raise UnsupportedOperation(
            f"Transformers cannot make the layers that predict further tokens: {error}"
        ) from error
    how = LoadStateDictConfig(
        weight_mapping=layers.get_weight_conversions(ends),
        device_map={"": model.device},
        dtype=model.dtype,
        ignore_mismatched_sizes=True,  # check_loaded reports them
    )
    found, _ = convert_and_load_state_dict_in_model(model=layers, state_dict=tensors, load_config=how)
    check_loaded(
        {
            "missing_keys": [each for each in found.missing_keys if not each.startswith(OF_THE_MODEL)],
            "mismatched_keys": found.mismatched_keys,
            "unexpected_keys": (),  # checkpoints repeat the embeddings and the head
            "error_msgs": found.error_msgs,
        }
    )
    layers.tie_with_main_model(ends)
    return layers.eval()
