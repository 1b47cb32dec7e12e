"""IBQ's tokenizer and generator for `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` of transformers.

`python -m ibq_jax convert --hub` copies this file as modeling_ibq.py next to torch_model.py, whose modules these are.
"""

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ibq_jax.interop.torch_model import Generator, Tokenizer, rotary_table  # in the copy: from .torch_model


class IbqConfig(PretrainedConfig):
    """The folder's config.json. `architecture` has the sizes, in the format of the published configurations."""

    model_type = "ibq"

    def __init__(self, architecture: dict | None = None, **fields: Any):
        self.architecture = architecture or {}
        super().__init__(**fields)


class IbqTokenizer(PreTrainedModel):
    """Images [B, 3, H, W] in [-1, 1] -> (reconstructions, codes [B, h, w]); `encode` and `decode` do each by itself."""

    config_class = IbqConfig
    main_input_name = "images"

    def __init__(self, config: IbqConfig):
        super().__init__(config)
        for name, part in Tokenizer.of(config.architecture).named_children():
            self.add_module(name, part)
        self.post_init()

    latent, encode, decode, forward = Tokenizer.latent, Tokenizer.encode, Tokenizer.decode, Tokenizer.forward


class IbqGenerator(PreTrainedModel):
    """Codes [B, S] and classes [B] -> logits [B, S, V]; `sample` draws codes."""

    config_class = IbqConfig
    main_input_name = "codes"

    def __init__(self, config: IbqConfig):
        super().__init__(config)
        generator = Generator.of(config.architecture)
        for name in ("grid", "positions", "num_classes", "no_class", "kv_heads", "head_channels"):
            setattr(self, name, getattr(generator, name))
        for name, part in generator.named_children():
            self.add_module(name, part)
        self.register_buffer("table", generator.table, persistent=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads the weights; the table of rotary angles, which no file holds, is computed again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        model.table = rotary_table(model.grid, model.head_channels).to(next(model.parameters()).device)
        return loaded

    embed, forward, loss, sample = Generator.embed, Generator.forward, Generator.loss, Generator.sample
    _guided_logits = Generator._guided_logits
