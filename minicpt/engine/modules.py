"""A tree of modules that other threads use too, and that anybody may change between two calls.

Three things keep a call's numbers its own: a hook that acts in the call that asked for it alone (`during_this_call`), a
copy of the tree around the same weights (`sharing_weights`), and a list of all that a result depends on (`State`), by
which a result that was kept is known to be stale.
"""

import copy
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as every_module
from transformers import PreTrainedConfig

# module -> what it does to its arguments, in the present thread (or task) alone
_ACTIONS: ContextVar[dict[nn.Module, Callable]] = ContextVar("actions", default={})
_INSTALLING = threading.Lock()
# these libraries' hooks watch, or treat all tokens alike; any other may count positions, and must see whole rows
_TRUSTED = {"accelerate", "minicpt", "peft", "torch", "transformers"}
_PLAIN = {bool, float, int, str}
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _act(module: nn.Module, args: tuple) -> tuple | None:
    action = _ACTIONS.get().get(module)
    return action(module, args) if action else None


@contextmanager
def during_this_call(actions: dict[nn.Module, Callable]) -> Iterator[None]:
    """Let `actions[module](module, args)` give a module's arguments (None: as they are), in this thread alone.

    The hook that looks the action up stays in the module and does nothing for anybody else: to add and remove one for
    each call is what threads that share a model trip over.
    """
    for module in actions:
        with _INSTALLING:
            if _act not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_act)
    token = _ACTIONS.set(_ACTIONS.get() | actions)
    try:
        yield
    finally:
        _ACTIONS.reset(token)


def sharing_weights(model: nn.Module) -> nn.Module:
    """Copy the tree of modules around the very same weights: what is built into the copy does not touch `model`."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): x for x in tensors})


def is_hooked(model: nn.Module) -> bool:
    """Whether a forward hook hangs in the model that is nobody's whom we know: it may need to see whole rows."""
    hooks = [*every_module._global_forward_hooks.values()]
    hooks += every_module._global_forward_pre_hooks.values()
    for module in model.modules():
        hooks += module._forward_hooks.values()
        hooks += module._forward_pre_hooks.values()
    return any(hook.__module__.split(".")[0] not in _TRUSTED for hook in hooks)


class State:
    """All that a model's result depends on besides its input; `is_same` compares it with another time's.

    Of every module: class, `forward`, weights and buffers (which tensor, which memory, which version), and plain
    attributes with all that stands in their lists, dictionaries and configurations. Two states are never the same
    if a module is in training mode, for it may draw random numbers, or if a weight counts no versions (inference mode).
    Not seen are what goes behind torch's back (`weight.data.mul_(2)`), and what a function of one's own reads.
    """

    def __init__(self, model: nn.Module | PreTrainedConfig):
        self.things, self.counts = [], []  # to compare by `is`, and by ==
        self._configs: set[int] = set()
        self.note(model)
        for module in model.modules() if isinstance(model, nn.Module) else ():
            own = vars(module)
            self.things += [weakref.ref(module), type(module), type(module).forward]
            for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
                self.note(tensor)
            for name, value in own.items():
                if name not in _OF_EVERY_MODULE:
                    self.things.append(name)
                    self.note(value) if type(value) not in _PLAIN else self.things.append(value)
            if module.training:
                self.counts.append(object())

    def note(self, value) -> None:
        """Add a value and whatever stands in it; references are weak where they could keep weights alive."""
        if isinstance(value, Tensor):
            self.things.append(weakref.ref(value))
            # as long as the reference to a storage lives, its address is given to no other
            self.counts.append(StorageWeakRef(value.untyped_storage()))
            self.counts.append(object() if value.is_inference() else value._version)
        elif isinstance(value, nn.Module):
            self.things.append(weakref.ref(value))
        elif isinstance(value, PreTrainedConfig):
            self.things.append(value)
            if id(value) not in self._configs:
                self._configs.add(id(value))
                self.note(vars(value))
        elif isinstance(value, (dict, list, tuple, set)):
            for part in (*value, *(value.values() if isinstance(value, dict) else ())):
                self.note(part)
            self.things.append(...)  # here it ends
        else:
            self.things.append(value)

    def is_same(self, other: "State") -> bool:
        """Whether nothing has changed between the two."""
        return (
            self.counts == other.counts
            and len(self.things) == len(other.things)
            and all(map(operator.is_, self.things, other.things))
        )
