"""How a split model is loaded and closed, and what transformers and PEFT do to its weights and adapter."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsea.checkpoints import Checkpoint, longest_text, open_checkpoint
from fedsea.client.adapter import TrainedAdapter
from fedsea.client.backbone import SplitBackbone, known_as
from fedsea.client.cache import SplitCache
from fedsea.client.connection import Endpoint, client_credentials
from fedsea.client.dtypes import compute_dtype, wire_dtype_for
from fedsea.client.middle import RemoteMiddle, Tap
from fedsea.client.notice import IN_TRAINING, leak_notice
from fedsea.client.optimizer import keep_state
from fedsea.client.protection import Protection, check_rank
from fedsea.client.stream import StreamSettings
from fedsea.client.traffic import Traffic
from fedsea.errors import UsageError
from fedsea.partition import Partition
from fedsea.parts import InputBlocks, OutputBlocks, check_family
from fedsea.parts.held import ANOTHER, NAME, TAKEN_OFF, OneConfig
from fedsea.parts.structure import turning_point
from fedsea.privacy import GaussianNoise, LookLedger, Noise, leak_warning
from fedsea.text import one_line
from fedsea.wire.credentials import Credentials

# How transformers would lay out files; an adapter is one small file.
_LAYOUT = {"max_shard_size", "safe_serialization", "variant", "save_peft_format", "save_original_format", "token"}


def tell(message: str) -> None:
    """Default notice: one line on standard error."""
    print(f"fedsea: {one_line(message)}", file=sys.stderr, flush=True)


class SplitPreTrainedModel(PreTrainedModel):
    """Parts, middle, protection and adapter of a split model, and what transformers and PEFT do to a model's weights.

    Each of their methods does what its name says on all three parts, or refuses in one line before anything is touched.
    Nothing that looks like a whole checkpoint is written by a part. `model` is the decoder, `middle` stands for the
    middle blocks (None if there are none), and the parameter `lora_middle` for their adapter (`fedsea.client.run`).
    """

    backbone: SplitBackbone
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules: list[str] = []  # noqa: RUF012 - transformers' own attribute
    supports_gradient_checkpointing = True

    def __new__(cls, input_blocks: InputBlocks, *_args: Any, **_kwargs: Any) -> Self:
        """A model of a class that goes by the name of the whole model's: libraries tell by it what a model is."""
        known = known_as(cls, input_blocks.config.model_type, input_blocks.structure)  # type: ignore[arg-type]
        return super().__new__(known)  # type: ignore[no-any-return]

    def __init__(
        self,
        input_blocks: InputBlocks,
        output_blocks: OutputBlocks,
        partition: Partition,
        protection: Protection,
        middle: RemoteMiddle | None,
        traffic: Traffic,
        max_tokens: int,
    ) -> None:
        super().__init__(input_blocks.config)
        self.partition, self.middle, self.protection, self.traffic = partition, middle, protection, traffic
        parts = (input_blocks, output_blocks)
        self.adapter = TrainedAdapter(self, parts, partition, middle, protection)
        backbone = SplitBackbone(parts, protection, middle, self.adapter, max_tokens)
        self.add_module(self.base_model_prefix, backbone)
        self.__dict__["backbone"] = backbone  # the same under one name for every family
        self.add_module(output_blocks.structure.head, output_blocks.head)
        self.narrow_cut = input_blocks.narrow_cut
        self.vocab_size: int = self.config.vocab_size  # resize_token_embeddings sets it
        if middle is not None:
            self.lora_middle = nn.Parameter(torch.zeros(1, device=input_blocks.device), requires_grad=False)
        self._audited_as = ""
        self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path | Checkpoint,
        *,
        server: str,
        credentials: str | Path | Credentials | None = None,
        insecure: bool = False,
        partition: Partition = Partition(),
        noise: Noise = GaussianNoise(0.0),
        dtype: str | torch.dtype = "float32",
        wire_dtype: str | None = None,
        device: str | torch.device = "cpu",
        reconnect_seconds: float = 60.0,
        notice: Callable[[str], None] = tell,
    ) -> Self:
        """Load the client's parts and meet the block server.

        Parameters
        ----------
        name
            What `open_checkpoint` takes: a hub id, a folder, a `.gguf` file, `smollm2-135m`, `random:<config>`.
        server, credentials
            The block server's `HOST:PORT`, and the client's folder of `fedsea credentials init`.
        insecure
            Connect without TLS. Only to a loopback address.
        partition
            How many of the first and last layers this client keeps.
        noise
            How to protect the hidden states that leave. A narrow cut is of use with an adapter only: its weights are
            trained with the adapter.
        dtype, wire_dtype
            Dtype of computation (float32, bfloat16 or float16), and of hidden states on the wire. By default 16 bits
            cross: bfloat16 if computed in it, else float16.
        device
            Where the client computes.
        reconnect_seconds
            How long to try to reach the server again after a connection is lost.
        notice
            Called with one line when a connection is lost and when it is back, and when the certificate ends soon.

        Raises
        ------
        FedSEAError
            If the model, the partition, the credentials or the server is wrong; one line that says what to do.
        """
        checkpoint = name if isinstance(name, Checkpoint) else open_checkpoint(name)
        config, computed, traffic = checkpoint.config, compute_dtype(dtype), Traffic()
        layers = partition.middle(config.num_hidden_layers)
        settings = StreamSettings(
            partition=partition,
            fingerprint=checkpoint.fingerprint(),
            wire_dtype=wire_dtype_for(wire_dtype, computed),
            hidden_size=config.hidden_size,
            reconnect_seconds=reconnect_seconds,
            notice=notice,
            turn=turning_point(config),
        )
        check_rank(noise, config.hidden_size, layers)
        middle, max_tokens = None, longest_text(config)
        if layers:
            known = client_credentials(server, credentials, insecure)
            if known is not None and (warning := known.ends_soon()) is not None:
                notice(warning)
            middle = RemoteMiddle(Endpoint(server, known), settings, traffic)
            # Before any weight is loaded: a wrong address, certificate, model or partition shows at once.
            max_tokens = min(max_tokens, middle.meet())
        check_family(config)
        input_blocks = InputBlocks.from_checkpoint(checkpoint, partition, dtype=computed, device=device)
        output_blocks = OutputBlocks.from_checkpoint(
            checkpoint, partition, dtype=computed, device=device, embedding=input_blocks.embedding.weight
        )
        protection = Protection(noise, input_blocks, checkpoint)
        model = cls(input_blocks, output_blocks, partition, protection, middle, traffic, max_tokens)
        model.generation_config = checkpoint.generation_config
        if middle is not None and not insecure:  # without TLS nothing leaves this machine
            model._audited_as = checkpoint.name
            model._tell_of_leak(leak_warning(protection.noise, partition, config.hidden_size, protection.measure))
        return model

    def _tell_of_leak(self, why: str, *, training: bool = False) -> None:
        """Say what is known to leak, and what audits it; nothing where nothing leaves this machine."""
        if self.middle is None or not self._audited_as:
            return
        layers = (self.partition.input_layers, self.partition.output_layers)
        mechanism = str(self.protection.spec) if self.protection.noise.alters else ""
        if line := leak_notice(why, self._audited_as, layers, mechanism, training=training):
            self.middle.settings.notice(line)

    @property
    def input_blocks(self) -> InputBlocks:
        """A, of the modules that are registered in this model now."""
        return self.backbone.input_blocks

    @property
    def output_blocks(self) -> OutputBlocks:
        """C, of the modules that are registered in this model now."""
        return self.backbone.output_blocks

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.get_submodule(self.backbone.structure.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Embed tokens by another module from now on."""
        self.set_submodule(self.backbone.structure.embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.get_submodule(self.backbone.structure.head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Make logits by another module from now on."""
        self.set_submodule(self.backbone.structure.head, new_embeddings)

    @property
    def max_tokens(self) -> int:
        """The longest text that the model and the server allow."""
        return self.backbone.max_tokens

    @property
    def micro_batches(self) -> int:
        """Into how many a training batch is split (`RemoteMiddle.micro_batches`); may be set."""
        return self.middle.micro_batches if self.middle is not None else 1

    @micro_batches.setter
    def micro_batches(self, count: int) -> None:
        if self.middle is not None:
            self.middle.micro_batches = count

    @property
    def tap(self) -> Tap | None:
        """As `RemoteMiddle.tap`; may be set."""
        return self.middle.tap if self.middle is not None else None

    @tap.setter
    def tap(self, tap: Tap | None) -> None:
        if self.middle is not None:
            self.middle.tap = tap

    @property
    def noise(self) -> Noise:
        """The mechanism that protects every hidden state that leaves; may be set."""
        return self.protection.noise

    @noise.setter
    def noise(self, noise: Noise) -> None:
        self.protection.noise = noise

    @property
    def look_ledger(self) -> LookLedger | None:
        """As `Protection.ledger`; may be set."""
        return self.protection.ledger

    @look_ledger.setter
    def look_ledger(self, ledger: LookLedger | None) -> None:
        self.protection.ledger = ledger

    def new_cache(self) -> SplitCache:
        """An empty cache, with a session of its own; pass it to `generate` or `forward` as `past_key_values`."""
        return self.backbone.new_cache()

    def extra_repr(self) -> str:
        at = f" at {self.middle.endpoint.address}" if self.middle is not None else ""
        return f"layers {self.partition.middle(self.config.num_hidden_layers)} elsewhere{at}"

    @property
    def wire_dtype(self) -> torch.dtype:
        """What states are rounded to on the wire."""
        return self.middle.settings.wire_dtype if self.middle is not None else self.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype; that of the parameters begins with the handle's."""
        return self.get_output_embeddings().weight.dtype  # type: ignore[return-value]

    def close(self) -> None:
        """Close all sessions, and wait a moment until the server knows."""
        if self.middle is not None:
            self.middle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # The adapter, by the names that transformers and PEFT have for it

    def add_adapter(
        self,
        adapter_config: LoraConfig,
        adapter_name: str | None = None,
        *,
        run: str | None = None,
        take_up: bool = False,
        seed: int | None = None,
    ) -> None:
        """Put a LoRA adapter on all three parts; the middle's is at the block server.

        Parameters
        ----------
        run
            The run's name at the server, to find it again from another process; None for one that ends with this
            model.
        take_up
            Go on with the run of this name if the server has it: the middle's part of the adapter is as it was left,
            and this model's part is for you to set (`adapter.set_training_state`). Otherwise a name that is there is an
            error.
        seed
            The same gives the same adapter to start from, for every partition. None draws one from torch's generator.

        Raises
        ------
        UsageError
            If there is an adapter already, or this one cannot be trained through the split.
        FedSEAError
            What the server refuses: too large an adapter, a run name that is taken.
        """
        if adapter_name not in (None, NAME) or self.adapter.spec is not None:
            raise UsageError(ANOTHER)
        self.adapter.add(adapter_config, run, take_up=take_up, seed=seed)
        self._tell_of_leak(IN_TRAINING, training=True)

    def load_adapter(  # type: ignore[override]
        self,
        peft_model_id: str | Path,
        adapter_name: str | None = None,
        is_trainable: bool = True,
        *,
        run: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a PEFT LoRA adapter of the whole model, trained in any partition or in one place.

        A narrow cut beside it is taken up, and with it the mechanism that it was trained with, unless this model has
        one of its own: that is then done on what the cut leaves. A `notice` says which it is.

        Parameters
        ----------
        peft_model_id
            Its folder.
        run
            As in `add_adapter`.

        Raises
        ------
        ModelNotFoundError, UsageError
            If the folder is no such adapter, or has no narrow cut where the model's mechanism asks for one.
        ModelMismatchError
            If the adapter is of another model, or of other targets or ranks than the one that the model has.
        PartitionError
            If it has a narrow cut after another layer.
        """
        if kwargs:
            raise UsageError(f"a split model's load_adapter does not take {', '.join(sorted(kwargs))}")
        if adapter_name not in (None, NAME):
            raise UsageError(ANOTHER)
        self.adapter.load(peft_model_id, run, trainable=is_trainable)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter of A, B and C as a PEFT adapter of the whole model; a narrow cut into files beside it."""
        self.adapter.save(folder, self.adapter.state())

    def adapter_state(self) -> dict[str, Tensor]:
        """The whole adapter, float32, by its names in the whole model; the middle's weights come from the server."""
        return self.adapter.state()

    def set_adapter_state(self, weights: Mapping[str, Tensor]) -> None:
        """Set the whole adapter from weights named as `adapter_state` names them; ModelMismatchError if they differ."""
        self.adapter.set_state(weights)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """As transformers' models: the whole adapter by its names in a PEFT file; None for the model's own state."""
        self.adapter.require_name(adapter_name or NAME)
        return self.adapter.chosen_state(state_dict)

    def active_adapters(self) -> list[str]:
        """As transformers' models: the names of the adapters that are in use."""
        return [NAME] if self.adapter.spec is not None else []

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """As transformers' models: use this adapter. There is one."""
        self.adapter.require_name(adapter_name)

    def enable_adapters(self) -> None:
        """As transformers' models: switch the adapter on again, on all parts."""
        self.adapter.switch_layers(True)

    def disable_adapters(self) -> None:
        """As transformers' models: switch the adapter off, on all parts. UsageError if it has a narrow cut."""
        self.adapter.switch_layers(False)

    def delete_adapter(self, adapter_names: str | list[str]) -> NoReturn:
        """Refused: the middle's half of the adapter would stay on."""
        raise UsageError(TAKEN_OFF)

    @property  # type: ignore[override]
    def peft_config(self) -> dict[str, LoraConfig]:
        """The adapter's configuration under its name, as PEFT keeps it."""
        if self.adapter.lora is None:
            raise AttributeError("peft_config")
        return OneConfig({NAME: self.adapter.lora})

    @peft_config.setter
    def peft_config(self, configs: dict[str, LoraConfig]) -> None:
        """PEFT sets this once it has put an adapter on the client's layers (`peft.get_peft_model`): take it up."""
        self.adapter.take_over(configs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As a transformers model with an adapter: write the adapter, of all three parts, as PEFT does.

        Raises
        ------
        UsageError
            If there is no adapter, an argument is not supported, or the folder cannot be written.
        ModelMismatchError
            If `state_dict`, named as the model's own, has not the adapter's weights.
        """
        self._check_savable()
        unsupported = sorted(kwargs.keys() - _LAYOUT) + ["push_to_hub"] * push_to_hub
        if unsupported:
            raise UsageError(f"a split model's save_pretrained does not take {', '.join(unsupported)}")
        if is_main_process:
            self.adapter.save(save_directory, self.adapter.chosen_state(state_dict))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As a transformers model with an adapter: upload the adapter, of all three parts. Without one, UsageError."""
        self._check_savable()
        return super().push_to_hub(*args, **kwargs)

    def _check_savable(self) -> None:
        if self.adapter.spec is None:
            raise UsageError(
                "a client holds a part of the model, and a part is no checkpoint: there is nothing to save before an "
                "adapter is added or loaded (model.add_adapter, model.load_adapter)"
            )

    def create_optimizer(
        self, lr: float = 1e-4, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> torch.optim.AdamW:
        """AdamW over A, B and C, as any `AdamW`, `Adam` or `SGD` of torch over `model.parameters()` is."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.adapter.spec is None or not trained:
            raise UsageError("there is nothing to train; add an adapter first: model.add_adapter(LoraConfig(...))")
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        keep_state(optimizer)
        return optimizer

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As torch's over `model.parameters()`: by the norm of all three parts, which it returns."""
        return torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        raise UsageError(
            "a split model holds a connection to its block server, so it cannot be copied or pickled; load it again "
            "with SplitModelForCausalLM.from_pretrained"
        )
