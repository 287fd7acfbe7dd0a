"""A model read block by block: what peaks in memory is one decoder block, not the model.

The model is built without its blocks' weights, and each block is replaced by a stub. Everything around the
blocks (embedding, masks, positions, final norm, head, scaling, soft-capping) is then run by the model's own
forward: the stubs note what the blocks are called with, and put given states in the place of theirs.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lmq.errors import InputError, UnsupportedModel
from lmq.model.auto_class import loss_of
from lmq.model.block_inputs import BlockInputs, by_name, copied, equal_inputs, same_tensors
from lmq.model.discovery import embed_scale, embedding_shape
from lmq.model.experts import RoutedExperts
from lmq.model.losses import LOSSES, Loss
from lmq.model.stored import StoredModel, read_stored_model
from lmq.model.structure import ModelStructure, ModuleInfo, Tower
from lmq.model.stubs import BlockStub, StopForward, StubHandler, StubSwitch
from lmq.numerics import OneDnnProducts, require_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLE_TOKENS = 12
_IMAGES_AT_ONCE = 16
_STATES_AT_ONCE = 2048
"""States, as patches of images have one each, that go through a block together."""
_LOGITS_AT_ONCE = 1 << 24
"""Logits held at a time (64 MB in float32), whatever the vocabulary."""

_EXPERTS_BYTES = 1 << 31
"""Routed experts of a block that take more are read one at a time where the block is only run."""

_tables: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()
"""Embeddings and heads that are in memory, by where they come from: models that are open at once share them."""
_reading_tables = threading.Lock()


def tokens_at_once(vocabulary_size: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(1, _LOGITS_AT_ONCE // vocabulary_size)


def sample_inputs(
    model: PreTrainedModel, seed: int = 0, tower: Tower | None = None, length: int | None = None
) -> Tensor:
    """A few arbitrary tokens [1, tokens] from the beginning of the vocabulary, where ordinary ones are, or one
    arbitrary image [1, channels, height, width]; those of a tower, in a model that has several.

    Of a tower of texts they are `length` tokens, or as many as it sees at once.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    if tower is not None and tower.input_name == "input_ids":
        text = config.text_config
        most = text.max_position_embeddings
        return torch.randint(0, text.vocab_size, (1, min(length or most, most)), generator=generator)
    if not loss_of(config).per_token:
        config = getattr(config, "vision_config", config)
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(1, config.num_channels, height, width, generator=generator)
    vocabulary = embedding_shape(model)[0]
    first, end = min(vocabulary // 10, 500), min(vocabulary, 1000)
    return torch.randint(first, end, (1, _SAMPLE_TOKENS), generator=generator)


class LossGradient(NamedTuple):
    """Gradient of the summed next-token cross-entropy (nats), the sum itself, and how many tokens it is over."""

    gradient: Tensor
    loss_sum: float
    tokens: int


class HeadTrace(NamedTuple):
    """What goes through the head: its `inputs` [tokens, hidden], the `probabilities` that are predicted [tokens,
    vocabulary], and `slopes` like them, the derivative of every logit by the output of the head that it comes from.
    """

    inputs: Tensor
    probabilities: Tensor
    slopes: Tensor


class StreamedModel:
    """A model of which only what lies around the decoder blocks is in memory; blocks are loaded one at a time.

    The two large tables, embedding and head, are read when they are first needed, and held once by all that are open
    on the same files. An object is for one thread; different objects can work in different threads.
    """

    def __init__(
        self,
        stored: StoredModel,
        structure: ModelStructure,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.structure = structure
        self.device = device
        self.dtype = dtype
        self._model: PreTrainedModel = stored.model
        self._stored = stored
        self._blocks = [self._model.get_submodule(structure.block_path(layer)) for layer in range(structure.layers)]
        self._types = {name: tensor.dtype for name, tensor in self._model.state_dict().items()}
        self._extra_outputs: tuple[Any, ...] | None = None
        self._held_tables: dict[str, Tensor] = {}
        self._switch = StubSwitch()
        for number in structure.judged_towers:
            parent, _, name = structure.towers[number].layers_path.rpartition(".")
            stubs = [BlockStub(self._blocks[layer], layer, self._switch) for layer in structure.layers_of(number)]
            setattr(self._model.get_submodule(parent), name, nn.ModuleList(stubs))
        self._load_around_blocks()
        self._extra_outputs = self._find_extra_outputs()

    @classmethod
    def open(
        cls,
        model_dir: Path,
        structure: ModelStructure,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> StreamedModel:
        """Open a safetensors checkpoint. Raises as `discover` does, and NotFiniteError for what is read."""
        return cls(read_stored_model(model_dir), structure, torch.device(device), dtype)

    @property
    def loss(self) -> Loss:
        """What the model is judged by."""
        return LOSSES[self.structure.loss]

    @property
    def tokens_at_once(self) -> int:
        """Tokens whose logits are held at a time."""
        return tokens_at_once(self.structure.vocabulary_size)

    @property
    def logit_scale(self) -> float:
        """What similarities of embeddings are multiplied by, in a model of two towers."""
        scale: Any = self._model.logit_scale
        return float(scale.exp())

    def sequences_at_once(self, sequence_length: int) -> int:
        """Sequences that go through a block together: of texts one, of images, which are short, several."""
        return 1 if self.loss.per_token else max(1, _STATES_AT_ONCE // sequence_length)

    def split(self, predicting: Tensor) -> tuple[Tensor, ...]:
        """States that predictions are made from [predictions, ...], in pieces whose outputs are held at a time."""
        if self.loss.per_token:
            return predicting.split(self.tokens_at_once)
        return predicting.split(max(1, _LOGITS_AT_ONCE // predicting[0].numel()))

    @contextmanager
    def block(self, layer: int, *, only_run: bool = False) -> Iterator[nn.Module]:
        """A decoder block with its weights in `dtype`; they are released on leaving, whoever still holds it.

        The block is the caller's own: its weights and modules may be replaced. Weights need no gradient. Of a block
        that is `only_run`, forward and back, with hooks but without a look at its weights, routed experts that take
        much are read one at a time, each time they are run. Raises NotFiniteError naming layer and tensor.
        """
        block = self.bare_block(layer)
        prefix = f"{self.structure.block_path(layer)}."
        apart = self._read_apart(block, prefix) if only_run else set()
        read = self._read((name for name in block.state_dict() if name not in apart), prefix)
        block.load_state_dict(block.state_dict() | read, assign=True)
        block._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        try:
            yield block
        finally:
            block.to("meta")

    def _read_apart(self, block: nn.Module, prefix: str) -> set[str]:
        """Have a block's experts read one at a time if they take much; their tensors by their names in the block."""
        apart: set[str] = set()
        for path, module in block.named_modules():
            if isinstance(module, RoutedExperts):
                names = [name for name, _ in module.slices(path)]
                size = sum(block.get_parameter(name).numel() for name in names) * self.dtype.itemsize
                if size > _EXPERTS_BYTES:
                    module.read = functools.partial(self._read_expert, prefix + path, module.matrices)
                    apart.update(names)
        return apart

    def _read_expert(self, path: str, matrices: Sequence[str], number: int) -> dict[str, Tensor]:
        """The weights of one expert by their names inside it."""
        return self._read((f"{name}.weight" for name in matrices), f"{path}.{number}.")

    def bare_block(self, layer: int) -> nn.Module:
        """A decoder block of the caller's own, without its weights (they are on the meta device)."""
        return copy.deepcopy(self._blocks[layer])

    @torch.no_grad()
    def block_inputs(self, sequence_length: int) -> list[BlockInputs]:
        """What each block is called with for sequences of this length, by layer; one beside a language model, which
        images go through, with states alone (`lmq.model.beside` finds where that does not do).

        Raises UnsupportedModel when that depends on the tokens and so cannot be kept for all of them.
        """
        recordings = [
            [
                inputs
                for tower in self.structure.judged_towers
                for inputs in self._record_inputs(sequence_length, tower, seed)
            ]
            for seed in (0, 1)
        ]
        for layer, (first, second) in enumerate(zip(*recordings, strict=True)):
            for name, value in {**dict(enumerate(first.args)), **first.kwargs}.items():
                other = second.kwargs[name] if isinstance(name, str) else second.args[name]
                if not same_tensors(value, other):
                    raise UnsupportedModel(
                        f"block {layer} of {self.structure.architecture} takes an input ({name}) that depends on the "
                        "tokens besides the hidden states; such blocks cannot be replayed one by one"
                    )
        return recordings[0] + [self.states_alone(layer) for layer in self.structure.layers_beside]

    def states_alone(self, layer: int) -> BlockInputs:
        """What a block beside the language model is called with: states alone, and None for whatever else it insists
        on, as a mask."""
        _, *others = inspect.signature(self._blocks[layer].forward).parameters.values()
        needed = [each for each in others if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
        return BlockInputs((None,) * len(needed), {}, self.device, self.dtype)

    @torch.no_grad()
    def embed(self, inputs: Tensor, tower: int = 0) -> Tensor:
        """States that enter block 0 [sequences, sequence_length, hidden] for token ids [sequences, sequence_length].

        Images [images, channels, height, width] in the place of tokens give [images, patches, hidden]. `tower` is what
        they are for, in a model that has several: the states are those that enter its first block. Raises
        InputError for a token outside the vocabulary.
        """
        if self.loss.per_token:
            largest = int(inputs.max())
            if largest >= self.structure.vocabulary_size or int(inputs.min()) < 0:
                raise InputError(
                    f"token {largest} is outside the model's vocabulary of {self.structure.vocabulary_size}; "
                    "is the tokenizer the model's own?"
                )
        self._load_tables()

        def stop(_: int, entering: Tensor, *__: Any) -> Any:
            raise StopForward(entering)

        rows = inputs.to(self.device).split(1 if self.loss.per_token else _IMAGES_AT_ONCE)
        return torch.cat([self._run_until_stopped(stop, tower, **self._given(row)) for row in rows])

    @torch.no_grad()
    def embed_pairs(self, sequences: Sequence[Sequence[Mapping[str, Tensor]]], sequence_length: int) -> Tensor:
        """States that enter block 0 [sequences, sequence_length, hidden] for images with text, packed into sequences.

        A pair is what the model's processor makes of it: `input_ids` [1, tokens] and the tensors of its image, which
        the model itself embeds and merges. Pairs of a sequence follow one another, and its last is cut. What lies
        beside the language model is read for that, and released. Raises as `check_pair` does.
        """
        with self.with_beside():
            joined = (torch.cat([self.merged(pair) for pair in pairs], dim=1) for pairs in sequences)
            return torch.cat([states[:, :sequence_length] for states in joined])

    @contextmanager
    def with_beside(self) -> Iterator[None]:
        """Inside it, what lies beside the language model has its weights in memory, and so have the tables."""
        self._load_tables()
        with self._in_place(self._read(self._beside_names())):
            yield

    def block_in_place(self, layer: int) -> nn.Module:
        """A block beside the language model as images go through it; its weights are there inside `with_beside`."""
        return self._blocks[layer]

    @torch.no_grad()
    def check_pair(self, pair: Mapping[str, Tensor]) -> None:
        """Raise UnsupportedModel where an image changes more than the states that enter block 0.

        So do positions in several dimensions, image tokens that see each other, and features that are added between
        blocks; positions that are added to embeddings do not let pairs be joined. No weight of tables or towers is
        read for that.
        """
        one, tensors = torch.ones((), device=self.device, dtype=self.dtype), self._model.state_dict()
        with self._in_place({name: one.expand(tensors[name].shape) for name in self._table_names()}):
            states = self.merged(pair)[0]
        of_text = states[states.isfinite().all(dim=1)]  # of images comes NaN, as their weights are not read
        if not torch.equal(of_text, of_text[:1].expand_as(of_text)):
            raise self._not_for_pairs("its embeddings of equal tokens differ from place to place")

    def head_logits(self, hidden: Tensor, tower: int = 0, inputs: Tensor | None = None) -> Tensor:
        """Logits [..., vocabulary] of states that leave the last block [..., hidden], token by token.

        Where sequences predict as a whole: the outputs [sequences, outputs] of states [sequences, patches, hidden], of
        the tower that they leave. A tower of texts looks at its `inputs`, the token ids, for where they end.
        """
        self._load_tables()
        sequences = hidden.reshape(-1, 1, hidden.shape[-1]) if self.loss.per_token else hidden
        states = sequences.to(self.device, self.dtype, copy=True)
        last = self.structure.layers_of(tower)[-1]

        def replace_last(layer: int, entering: Tensor, *_: Any) -> Any:
            return self._as_output(states if layer == last else entering)

        with self._switch.to(replace_last), OneDnnProducts():
            given = (
                self._dummy(*states.shape[:2], tower=tower) if inputs is None else self._given(inputs.to(self.device))
            )
            outputs = self.loss.outputs(self._run(tower, given))
        return outputs.reshape(*hidden.shape[:-1], outputs.shape[-1]) if self.loss.per_token else outputs

    def loss_gradient(self, hidden: Tensor, given: Tensor) -> LossGradient:
        """Gradient of the summed loss with respect to the states that leave the last block.

        `hidden` [sequences, sequence_length, hidden], `given` the token ids of a text, or the labels of images. Token
        t + 1 is predicted from position t, so that the gradient of each last position of a text is 0 here. Same shape
        and device as `hidden`, float32. Only some logits are held at a time.
        """
        states, targets = self.loss.predicting(hidden), self.loss.targets(given).to(self.device)
        found, loss_sum, start = [], 0.0, 0
        for states_piece in self.split(states):
            piece = states_piece.detach().to(self.device, self.dtype).requires_grad_(True)
            with torch.enable_grad():
                loss = self.loss.summed(self.head_logits(piece).float(), targets[start : start + len(piece)])
                (piece_gradient,) = torch.autograd.grad(loss, piece)
            found.append(piece_gradient.float())
            loss_sum += loss.item()
            start += len(piece)
        gradient = self.loss.at_states(torch.cat(found)[None], hidden)[0]
        return LossGradient(gradient, loss_sum, len(states))

    def put_embedding(self, module: ModuleInfo, weight: Tensor) -> None:
        """Put `weight` [vocabulary, hidden] in the place of an embedding of the structure; of both where tied."""
        names = [f"{self.structure.path(module.id)}.weight"]
        if module.part == "tied":
            names = sorted(self._table_names())
        self._model.load_state_dict(dict.fromkeys(names, weight.to(self.device, self.dtype)), strict=False, assign=True)

    def head_trace(self, hidden: Tensor) -> HeadTrace:
        """What goes through the head for states that leave the last block [tokens, hidden].

        What follows the head is taken to work on every logit by itself, as scaling and soft-capping do.
        """
        found: dict[str, Tensor] = {}

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            found["inputs"] = args[0].detach().flatten(0, -2)
            found["outputs"] = output.detach().requires_grad_(True)
            return found["outputs"]

        handle = self._model.get_output_embeddings().register_forward_hook(keep)
        try:
            with torch.enable_grad():
                logits = self.head_logits(hidden)
                (slopes,) = torch.autograd.grad(logits.sum(), found["outputs"])
        finally:
            handle.remove()
        return HeadTrace(found["inputs"], logits.detach().float().softmax(-1), slopes.float().view_as(logits))

    def embedding_gradient(self, token_ids: Tensor, gradient: Tensor) -> Tensor:
        """Gradient at the row of the embedding that every token looked up, from that at the states that enter block 0.

        `token_ids` [sequences, sequence_length], `gradient` [draws · sequences, sequence_length, hidden], sequences
        fastest; the result is like it in shape, float32.
        """
        self._load_tables()
        table = self._model.get_input_embeddings()
        found: dict[str, Tensor] = {}

        def keep(*args: Any) -> Tensor:
            found["rows"] = args[-1].detach().requires_grad_(True)
            return found["rows"]

        def stop(_: int, entering: Tensor, *__: Any) -> Any:
            raise StopForward(entering)

        scale = embed_scale(table)
        result = torch.empty_like(gradient, dtype=torch.float32)
        handle = table.register_forward_hook(keep)
        try:
            for sequence, row in enumerate(token_ids.to(self.device).long().split(1)):
                with torch.enable_grad():
                    entering = self._run_until_stopped(stop, 0, **self._given(row))
                for draw in range(sequence, len(gradient), len(token_ids)):
                    of_states = gradient[draw : draw + 1].to(entering)
                    (of_rows,) = torch.autograd.grad(entering, found["rows"], of_states, retain_graph=True)
                    result[draw] = of_rows[0].float() * scale
        finally:
            handle.remove()
        return result

    def _load_around_blocks(self) -> None:
        """Read what lies around the blocks, but for the tables, and put what is computed on the device.

        What lies beside the language model is not read: text does not go through it. In its place are tensors that
        take no memory, of which nothing but NaN comes, on the device that some models ask it for.
        """
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))
        beside = set(self._beside_names())
        unread = {name: tensor for name, tensor in self._model.state_dict().items() if name in beside}
        nothing = torch.tensor(torch.nan, device=self.device, dtype=self.dtype)
        stand_ins = {name: nothing.expand(t.shape) for name, t in unread.items() if t.is_floating_point()}
        self._model.load_state_dict(stand_ins, strict=False, assign=True)
        self._assign(name for name in self._model.state_dict() if name not in {*unread, *self._table_names()})

    def _beside_names(self) -> list[str]:
        """Names of what lies beside the language model."""
        beside = tuple(f"{path}." for path in self.structure.parts_beside)
        return [name for name in self._model.state_dict() if name.startswith(beside)]

    @contextmanager
    def _in_place(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """These tensors of the model in the place of what it has; that is put back on leaving."""
        before = {name: tensor for name, tensor in self._model.state_dict().items() if name in tensors}
        self._model.load_state_dict(tensors, strict=False, assign=True)
        try:
            yield
        finally:
            self._model.load_state_dict(before, strict=False, assign=True)

    def _load_tables(self) -> None:
        """Read embedding and head, unless that is done or another model holds them."""
        missing = [name for name, tensor in self._model.state_dict().items() if tensor.is_meta]
        if not missing:
            return
        with _reading_tables:
            keys = {name: self._table_key(name) for name in missing}
            held = {name: table for name, key in keys.items() if (table := _tables.get(key)) is not None}
            self._held_tables = held | self._read(name for name in missing if name not in held)
            _tables.update({keys[name]: table for name, table in self._held_tables.items()})
        self._model.load_state_dict(self._held_tables, strict=False, assign=True)

    def _table_key(self, name: str) -> tuple[Any, ...]:
        """What two tensors that hold the same values have in common."""
        stored = self._stored.tensors.get(name)
        if stored is None:  # computed from several
            return (id(self), name)
        return (stored, stored.file.stat().st_mtime_ns, self.dtype, self.device)

    def _table_names(self) -> set[str]:
        if not self.loss.per_token:
            return set()
        tables = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        paths = {path for path, module in self._model.named_modules() if any(module is table for table in tables)}
        names = (name for name in self._model.state_dict() if not name.endswith(".bias"))
        return {name for name in names if name.rpartition(".")[0] in paths}

    def _assign(self, names: Iterable[str]) -> None:
        self._model.load_state_dict(self._read(names), strict=False, assign=True)

    def _read(self, names: Iterable[str], prefix: str = "") -> dict[str, Tensor]:
        """Those of the tensors that are stored, in `dtype` on the device; tied ones are one tensor.

        Raises NotFiniteError naming the tensor.
        """
        values = self._stored.read(prefix + name for name in names if self._stored.holds(prefix + name))
        cast: dict[int, Tensor] = {}
        for name, value in values.items():
            if id(value) not in cast:
                require_finite(value, name)
                cast[id(value)] = self._cast(value, name)
        return {name.removeprefix(prefix): cast[id(value)] for name, value in values.items()}

    def _cast(self, value: Tensor, name: str) -> Tensor:
        """On the device; in `dtype` but for what the model keeps in a type of its own, as grids of quantized layers."""
        follows = value.is_floating_point() and self._types.get(name, torch.float32) == torch.float32
        return value.to(self.device, self.dtype) if follows else value.to(self.device)

    def _given(self, inputs: Tensor) -> dict[str, Any]:
        """Arguments of the model for token ids, or for images."""
        if inputs.is_floating_point():
            return {"pixel_values": inputs.to(self.dtype)}
        return {"input_ids": inputs.long()} | ({"use_cache": False} if self.loss.per_token else {})

    def _run(self, tower: int, inputs: Mapping[str, Any]) -> Any:
        """What the model, or one of its towers, makes of these."""
        features = self.structure.towers[tower].features
        return self._model(**inputs) if features is None else getattr(self._model, features)(**inputs)

    def _dummy(self, sequences: int, sequence_length: int, seed: int = 0, *, tower: int = 0) -> dict[str, Any]:
        """Arguments of the model with arbitrary embeddings, or images, where the stubs put states in their place."""
        generator = torch.Generator().manual_seed(seed)
        if not self.loss.per_token:
            sample = self.sample_inputs(seed, tower, sequence_length).to(self.device)
            return self._given(sample.expand(sequences, *sample.shape[1:]))
        width = embedding_shape(self._model)[1]
        embeddings = torch.randn(sequences, sequence_length, width, generator=generator)
        return {"inputs_embeds": embeddings.to(self.device, self.dtype), "use_cache": False}

    def sample_inputs(self, seed: int = 0, tower: int = 0, length: int | None = None) -> Tensor:
        """A few arbitrary tokens [1, tokens] from the beginning of the vocabulary, where ordinary ones are, or one
        arbitrary image [1, channels, height, width]."""
        return sample_inputs(self._model, seed, self.structure.towers[tower], length)

    def _record_inputs(
        self, sequence_length: int, tower: int, seed: int, layers: int | None = None
    ) -> list[BlockInputs]:
        """What the first `layers` blocks of a tower (None: all) are called with for arbitrary embeddings."""
        layers = layers or self.structure.towers[tower].layers
        recorded: list[BlockInputs] = []
        is_text = self.loss.per_token
        expected = (1, sequence_length if is_text else "any", self.structure.towers[tower].hidden_size)

        def record(_: int, entering: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if entering.shape != (1, expected[1] if is_text else entering.shape[1], expected[2]):
                raise UnsupportedModel(
                    f"the blocks of {self.structure.architecture} take states of shape {list(entering.shape)} where "
                    f"[sequences, tokens, hidden size] is {list(expected)}; such blocks cannot be replayed one by one"
                )
            recorded.append(BlockInputs(copied(args), copied(kwargs), self.device, self.dtype))
            if len(recorded) == layers:
                raise StopForward(entering)
            return self._as_output(entering)

        self._run_until_stopped(record, tower, **self._dummy(1, sequence_length, seed, tower=tower))
        return recorded

    def merged(self, pair: Mapping[str, Tensor]) -> Tensor:
        """States that enter block 0 [1, tokens, hidden] for an image with text, merged by the model itself.

        What lies beside the language model is to be there (`with_beside`). Raises UnsupportedModel where a block is
        called otherwise than for as many tokens of text.
        """
        expected = self.block_inputs(pair["input_ids"].shape[1])
        entered: list[Tensor] = []

        def check(layer: int, entering: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = by_name(args, kwargs)
            of_text = by_name(expected[layer].args, expected[layer].kwargs)
            for name in sorted({*given, *of_text}):
                if not equal_inputs(given.get(name), of_text.get(name)):
                    raise self._not_for_pairs(f"it gives block {layer} another {name} than for text")
            entered.append(entering)
            if entering is not entered[0] and not torch.equal(entering, entered[0]):
                raise self._not_for_pairs(f"it changes the states between its blocks, before block {layer}")
            if layer == self.structure.layers_of(0)[-1]:
                raise StopForward(entered[0])
            return self._as_output(entering)

        inputs = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in pair.items()
        }
        return self._run_until_stopped(check, 0, use_cache=False, **inputs)

    def _not_for_pairs(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.structure.architecture} cannot be calibrated on images with text: {why}; calibrate it on text "
            "(leave out images.text_column)"
        )

    def _run_until_stopped(self, handler: StubHandler, tower: int, **inputs: Any) -> Tensor:
        """Run the model's forward until a stub stops it; the states that entered that stub."""
        called: set[int] = set()

        def noted(layer: int, *given: Any) -> Any:
            called.add(layer)
            return handler(layer, *given)

        try:
            with self._switch.to(noted):
                self._run(tower, inputs)
        except StopForward as stop:
            return stop.entering
        what = (
            f"{self.structure.architecture} does not call its {len(self.structure.layers_of(tower))} blocks one by one"
        )
        for layer in self.structure.layers_of(tower):
            if layer not in called:
                kind = type(self._blocks[layer]).__name__
                raise UnsupportedModel(
                    f"{what}: {self.structure.block_path(layer)}, a {kind}, is left out without an image or what it "
                    "takes else beside the states; lmq replays blocks that states go through one after the other"
                )
        raise UnsupportedModel(what)

    @torch.no_grad()
    def _find_extra_outputs(self) -> tuple[Any, ...] | None:
        """What a block returns after its states, or None when it returns the states alone; found without memory."""
        inputs = self._record_inputs(sequence_length=2, tower=0, seed=0, layers=1)[0]
        block = copy.deepcopy(self._blocks[0]).to("meta")
        args, kwargs = tree_map(
            lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (inputs.args, inputs.kwargs)
        )
        hidden = torch.empty(1, 2, self.structure.hidden_size, device="meta", dtype=self.dtype)
        output = block(hidden, *args, **kwargs)
        return output[1:] if isinstance(output, tuple) else None

    def _as_output(self, hidden: Tensor) -> Any:
        """States in the form in which a block returns them."""
        return hidden if self._extra_outputs is None else (hidden, *self._extra_outputs)
