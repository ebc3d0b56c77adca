"""Layers with a recurrent or convolutional state instead of keys and values, or beside them.

The states are transformers' own (`LinearAttentionLayer`): unrounded, in the dtypes in which the model hands them over.
This module adds what a text's whole life on an `Fp16Cache` needs: memory for `batch_size` sequences that stays where it
is (a captured CUDA graph has its address), other numbers of sequences, choosing among them, copies and files.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers import cache_utils
from transformers.cache_utils import LinearAttentionLayer

from .groups import LayerGroup
from .layer_plan import LayerPlan
from .layers import Fp16Layer, belongs_to_the_cache, copied_with_the_cache, without_gradient
from .shared import SharedState

PARTS = ("conv", "recurrent")  # the two kinds of states, each numbered: `conv_states[0]`


def chosen(memory: Tensor, sequences: Tensor, active: int | None) -> Tensor:
    """Rows `sequences` of the first `active` ones. A number out of range (of a GPU's they are not looked at) leaves its
    sequence as it is."""
    at = sequences.to(memory.device)
    own = torch.arange(len(at), device=at.device)
    return memory.index_select(0, torch.where((at >= 0) & (at < (active or 0)), at, own))


def _alike(memory: Tensor, states: Tensor, part: str) -> bool:
    """Whether memory is for such states. (The last dimension of a convolution's is its tokens.)"""
    shapes = [x.shape[1:-1] if part == "conv" else x.shape[1:] for x in (memory, states)]
    return memory.dtype == states.dtype and memory.device == states.device and shapes[0] == shapes[1]


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A layer that keeps states alone. A state is `[sequences in use, ...]`, a view into memory for `batch_size`."""

    is_croppable = False
    is_compileable = False

    def __init__(self, shared: SharedState, number_of_states: int, *, here: bool = True) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.shared = shared
        self.here = here  # no other stage of a pipeline has it
        self.memory: dict[tuple[str, int], Tensor] = {}  # by part and number: [batch_size, ...]
        self.updates = 0  # of states since the layer was made; not counted in compiled code

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.memory)} states)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copied_with_the_cache(self, memo)

    def _states(self, part: str) -> dict[int, Tensor | None]:
        states: dict[int, Tensor | None] = getattr(self, f"{part}_states")
        return states

    def use_first(self, sequences: int) -> None:
        """Makes the states those of so many sequences, the first in memory."""
        for (part, number), memory in self.memory.items():
            state = self._states(part)[number]
            if state is None or state.shape[0] != sequences:
                self._states(part)[number] = memory[:sequences]

    # What models call

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:
        if keys_and_values:  # of a layer that has both: they are there from the beginning
            return
        number = states.get("state_idx", 0)
        LinearAttentionLayer.lazy_initialization(self, **states)
        for part in PARTS:
            given = states.get(f"{part}_states")
            if given is not None:
                made = self._states(part)[number]
                assert made is not None
                shape = self.shared.batch_size, *made.shape[1:]
                with torch.inference_mode(False):  # it is to be written outside of it, too
                    self.memory[part, number] = torch.zeros(shape, dtype=made.dtype, device=made.device)
                self._states(part)[number] = self.memory[part, number][: len(made)]

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **options: Any) -> Tensor:
        """See `Cache.update_conv_state`."""
        self._begin_update("conv", state_idx, conv_states)
        new: Tensor = super().update_conv_state(conv_states.detach(), state_idx, **options)
        return without_gradient(new, conv_states)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **options: Any) -> Tensor:
        """See `Cache.update_recurrent_state`."""
        self._begin_update("recurrent", state_idx, recurrent_states)
        new: Tensor = super().update_recurrent_state(recurrent_states.detach(), state_idx, **options)
        return without_gradient(new, recurrent_states)

    def _begin_update(self, part: str, number: int, new: Tensor) -> None:
        if is_compiling():
            return
        sequences, memory = len(new), self.memory.get((part, number))
        if memory is not None and not _alike(memory, new, part):
            self._begin_anew(part, number, memory, new)
        if not any(self.has_previous_state.values()):
            self.shared.use_sequences(sequences, 0)
        elif self.shared.active != sequences:
            raise ValueError(
                f"Fp16Cache: it holds {self.shared.active} sequences, and states of {sequences} came; reset() it to "
                "begin anew"
            )
        self.updates += 1
        self.use_first(sequences)

    def _begin_anew(self, part: str, number: int, memory: Tensor, new: Tensor) -> None:
        """Lets go of memory that the model's states do not fit any more: it was moved, or has another dtype."""
        if any(self.has_previous_state.values()):
            raise ValueError(
                f"Fp16Cache: it holds a state of {memory.dtype} {list(memory.shape[1:])} on {memory.device}, and one "
                f"of {new.dtype} {list(new.shape[1:])} on {new.device} came; reset() it, or load a file of this model"
            )
        del self.memory[part, number]
        self._states(part)[number] = None
        getattr(self, f"is_{part}_states_initialized")[number] = False

    def activate_past_recording(self) -> NoReturn:
        refuse_to_take_back()

    # What the cache does with all its layers

    def forget(self) -> None:
        for memory in self.memory.values():
            memory.zero_()
        self.has_previous_state = dict.fromkeys(range(self.number_of_states), False)

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequence `sequences[i]` was. `sequences`: int64 `[n]`, any device."""
        for (part, number), memory in self.memory.items():
            state = self._states(part)[number]
            assert state is not None
            memory[: len(sequences)] = chosen(memory, sequences, len(state))
        self.use_first(len(sequences))

    def snapshot(self) -> dict[tuple[str, int], Tensor]:
        return {which: memory.clone() for which, memory in self.memory.items()}

    def restore(self, snapshot: dict[tuple[str, int], Tensor]) -> None:
        """Puts back what `snapshot` returned, where it was."""
        for which, memory in self.memory.items():
            memory.copy_(snapshot[which])

    # Files and pickles

    def described(self) -> dict[str, Any]:
        """What a file's JSON says about the states, beside `saved_states`."""
        return {
            "previous": list(self.has_previous_state.values()),
            "conv_kernel_size": list(self.conv_kernel_size.values()),
        }

    def saved_states(self) -> dict[str, Tensor]:
        """The states of the sequences in use, by names such as "conv.0"."""
        found = {f"{part}.{number}": self._states(part)[number] for part, number in self.memory}
        return {name: state for name, state in found.items() if state is not None}

    def load_states(self, described: dict[str, Any], states: dict[str, Tensor], device: torch.device) -> None:
        """Takes what `described` and `saved_states` returned."""
        for name, state in states.items():
            part, _, number = name.partition(".")
            self._initialize(part, int(number), state.to(device))
        self.has_previous_state = dict(enumerate(described["previous"]))
        self.conv_kernel_size = dict(enumerate(described["conv_kernel_size"]))

    def _initialize(self, part: str, number: int, state: Tensor) -> None:
        self.lazy_initialization(**{f"{part}_states": state, "state_idx": number})
        self.memory[part, number][: len(state)] = state

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: memory, without the views into it."""
        used = {which: len(state) for which in self.memory if (state := self._states(which[0])[which[1]]) is not None}
        rest = {name: value for name, value in self.__dict__.items() if name not in ("conv_states", "recurrent_states")}
        return rest | {"used": used}

    def __setstate__(self, state: dict[str, Any]) -> None:
        used = state.pop("used")
        self.__dict__.update(state)
        for part in PARTS:
            setattr(self, f"{part}_states", dict.fromkeys(range(self.number_of_states)))
        for (part, number), memory in self.memory.items():
            self._states(part)[number] = memory[: used[part, number]]

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = belongs_to_the_cache
    offload = prefetch = Fp16Layer.offload


class HybridLayer(StateLayer, Fp16Layer):
    """A layer with keys and values, and states beside them."""

    def __init__(self, shared: SharedState, cache: LayerGroup, index: int, plan: LayerPlan) -> None:
        StateLayer.__init__(self, shared, plan.states)
        Fp16Layer.__init__(self, shared, cache, index, plan)
        self.is_compileable = False


class EmptyLayer(getattr(cache_utils, "DummyLayer", object)):  # type: ignore[misc]
    """A layer of a model that keeps nothing: a mixture of experts, say. (transformers has such a class since 5.23.)"""

    supports_early_init = False
    is_compileable = is_croppable = is_initialized = True
    keys = values = None

    def __init__(self) -> None:
        """It has no state."""

    def get_max_length(self) -> int:
        return -1


def refuse_to_take_back() -> NoReturn:
    raise NotImplementedError(
        "Fp16Cache: the model has recurrent or convolutional states, from which tokens cannot be taken back; reset() "
        "the cache and prefill the text anew (assisted decoding needs a model without such layers)"
    )
