"""Small random models of Transformers, made from configurations, and inputs for them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

VOCABULARY = 61
BATCH, TARGET, SOURCE = 2, 23, 27
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "dropout": 0.0,
    **ENDS,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        config: Makes its configuration, without any dropout.
        model: Its class.
        kind: ``"decoder"``, ``"encoder"``, ``"seq2seq"``, ``"image"`` or ``"audio"``.
    """

    name: str
    config: Callable[[], Any]
    model: str
    kind: str

    def build(self, dtype: torch.dtype, implementation: str, **changes: Any) -> Any:
        """The model, the same numbers for every dtype and implementation."""
        config = self.config()
        for name, value in changes.items():
            assert hasattr(config, name), name
            setattr(config, name, value)
        kind = getattr(transformers, self.model)
        generator = torch.Generator().manual_seed(7)
        model = kind._from_config(config, attn_implementation=implementation)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.25 + (1.0 if parameter.dim() == 1 else 0.0))
        return model.to(dtype).eval()

    @property
    def generates(self) -> bool:
        return self.kind in ("decoder", "seq2seq", "audio")

    def inputs(self, padding: str | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """Arguments of the model's ``forward``; ``padding`` is None, ``"left"`` or ``"right"``."""
        generator = torch.Generator().manual_seed(11)

        def tokens(length: int) -> Tensor:
            return torch.randint(2, VOCABULARY, (BATCH, length), generator=generator)

        if self.kind == "image":
            return {"pixel_values": torch.randn(BATCH, 3, 12, 12, generator=generator).to(dtype)}
        if self.kind == "audio":
            features = torch.randn(BATCH, 8, 2 * SOURCE, generator=generator).to(dtype)
            given = {"input_features": features, "decoder_input_ids": tokens(TARGET)}
            return given | _padding("decoder_attention_mask", TARGET, padding)
        if self.kind == "seq2seq":
            given = {"input_ids": tokens(SOURCE), "decoder_input_ids": tokens(TARGET)}
            given |= _padding("attention_mask", SOURCE, padding)
            return given | _padding("decoder_attention_mask", TARGET, padding)
        return {"input_ids": tokens(TARGET)} | _padding("attention_mask", TARGET, padding)

    def prompt(self, padding: str | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """Arguments of ``generate``."""
        given = self.inputs(padding, dtype)
        return {
            name: given[name]
            for name in ("input_ids", "input_features", "attention_mask")
            if name in given
        }


def _padding(name: str, length: int, side: str | None) -> dict[str, Tensor]:
    if side is None:
        return {}
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    if side == "left":
        mask[1, :9] = 0
    else:
        mask[1, -9:] = 0
    return {name: mask}


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "t5",
            lambda: transformers.T5Config(
                vocab_size=VOCABULARY,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                relative_attention_num_buckets=8,
                relative_attention_max_distance=12,
                decoder_start_token_id=1,
                dropout_rate=0.0,
                **ENDS,
            ),
            "T5ForConditionalGeneration",
            "seq2seq",
        ),
        Family(
            "bert",
            lambda: transformers.BertConfig(
                **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            ),
            "BertForMaskedLM",
            "encoder",
        ),
        Family(
            "bart",
            lambda: transformers.BartConfig(**SEQ2SEQ, max_position_embeddings=64),
            "BartForConditionalGeneration",
            "seq2seq",
        ),
        Family(
            "gpt2",
            lambda: transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **ENDS,
            ),
            "GPT2LMHeadModel",
            "decoder",
        ),
        Family(
            "llama",
            lambda: transformers.LlamaConfig(**SIZES, **ENDS),
            "LlamaForCausalLM",
            "decoder",
        ),
        Family(
            "mistral",
            lambda: transformers.MistralConfig(**SIZES, **ENDS, sliding_window=7),
            "MistralForCausalLM",
            "decoder",
        ),
        Family(
            "gemma2",
            lambda: transformers.Gemma2Config(
                **SIZES,
                **ENDS,
                sliding_window=7,
                attn_logit_softcapping=3.0,
                query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"],
            ),
            "Gemma2ForCausalLM",
            "decoder",
        ),
        Family(
            "gpt_oss",
            lambda: transformers.GptOssConfig(
                **SIZES,
                **ENDS,
                sliding_window=7,
                num_local_experts=8,
                num_experts_per_tok=8,
                layer_types=["sliding_attention", "full_attention"],
                experts_implementation="eager",
            ),
            "GptOssForCausalLM",
            "decoder",
        ),
        Family(
            "vit",
            lambda: transformers.ViTConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=12,
                patch_size=3,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            "ViTModel",
            "image",
        ),
        Family(
            "whisper",
            lambda: transformers.WhisperConfig(
                **SEQ2SEQ,
                num_mel_bins=8,
                max_source_positions=SOURCE,
                max_target_positions=64,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            ),
            "WhisperForConditionalGeneration",
            "audio",
        ),
    )
}


def valid(family: Family, given: dict[str, Tensor], output: Any) -> Tensor:
    """The numbers of a model's output where there is a token."""
    numbers = output.last_hidden_state if family.kind == "image" else output.logits
    name = "decoder_attention_mask" if family.kind in ("seq2seq", "audio") else "attention_mask"
    mask = given.get(name)
    return numbers.flatten(0, 1) if mask is None else numbers[mask.bool()]


def results(family: Family, model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output where there is a token, and the gradient of every parameter."""
    model.zero_grad()
    # A cache would be filled to no end.
    uncached = {"use_cache": False} if family.generates else {}
    output = valid(family, given, model(**given, **uncached))
    generator = torch.Generator().manual_seed(13)
    weighting = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    ((output.double() * weighting).sum() / output.numel() ** 0.5).backward()
    gradients = {
        f"grad {name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    # The error of a handful of numbers is a matter of luck: they are looked at together.
    few = [name for name, gradient in gradients.items() if gradient.numel() < 16]
    if few:
        gradients["grad of small parameters"] = torch.cat([gradients.pop(name) for name in few])
    return {"output": output.detach()} | gradients


@contextlib.contextmanager
def softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Some models' eager attention rounds the softmax to float32, which no oracle should."""
    plain = torch.nn.functional.softmax

    def softmax(input: Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
        wide = input.dtype == torch.float64 and dtype == torch.float32
        return plain(input, *args, dtype=None if wide else dtype, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        yield
